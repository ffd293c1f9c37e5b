"""The chat page in a real browser: chat, sparsity, comparison, heat map, keyboard, no request to another host."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_serve import Server, serving

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def page(tiny_folder: Path) -> Iterator[Any]:
    with serving(tiny_folder, "--sparsity", "0.5", "--sparsities", "0.3", "--name", "tiny") as server:
        with playwright.sync_playwright() as browsers:
            browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme="dark")
            open_page(page, server)
            yield page
            browser.close()


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
    assert len(shares) == 3 * 7 and all(20 <= share <= 80 for share in shares)


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
