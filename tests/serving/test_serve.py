"""The server as its users meet it: a process on a free port, the stock openai client, and bodies that are wrong."""

import http.client
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from teal.bench import soak
from tests.conftest import run_command
from tests.server_process import QUESTION, WEATHER, Server, serving

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chat_with_the_stock_client(server: Server) -> None:
    client = server.client
    assert [model.id for model in client.models.list()] == ["tiny"]
    common: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**common, extra_body={"ignore_eos": True})
    assert whole.choices[0].finish_reason == "length" and whole.usage is not None
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (12, whole.usage.prompt_tokens + 12)
    chunks = list(client.chat.completions.create(
        **common, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
    ))  # fmt: skip
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_choices_seeds_and_penalties(server: Server) -> None:
    common: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 16, "temperature": 1.5, "n": 3}
    one, two, other = (
        [c.message.content for c in server.client.chat.completions.create(**common, seed=seed).choices]
        for seed in (5, 5, 6)
    )
    assert one == two != other and len(set(one)) == 3
    plain, changed = (
        server.client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=30,
            temperature=0,
            frequency_penalty=p,
            extra_body={"ignore_eos": True},
        )
        .choices[0]
        .message.content
        for p in (0, 2)
    )
    assert plain != changed


def test_log_probabilities(server: Server) -> None:
    common: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 5}
    answer = server.client.chat.completions.create(
        **common, messages=QUESTION, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}
    )
    content = answer.choices[0].logprobs.content
    assert content is not None and len(content) == 5
    for entry in content:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0
        assert len(entry.top_logprobs) == 3
    plain = server.client.completions.create(
        **common, prompt=["The", "Europe"], logprobs=2, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in plain.choices] == [0, 1]
    found = plain.choices[0].logprobs
    assert found is not None and len(found.tokens or []) == len(found.token_logprobs or []) == 5
    streamed = server.client.completions.create(
        **common, prompt="The", logprobs=2, stream=True, extra_body={"ignore_eos": True}
    )
    tokens = [t for chunk in streamed for c in chunk.choices if c.logprobs for t in c.logprobs.tokens or []]
    assert tokens == found.tokens


def test_stop_strings(server: Server) -> None:
    common: dict[str, Any] = {"model": "tiny", "prompt": "The", "temperature": 0, "max_tokens": 40}
    text = server.client.completions.create(**common, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[10:13]
    answer = server.client.completions.create(**common, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"


def test_answers_follow_a_schema(server: Server) -> None:
    for seed in range(4):
        answer = server.client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=100, temperature=1.0, seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        person = json.loads(answer.choices[0].message.content or "")
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 99
    text = server.client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=60, temperature=1.0, seed=1, response_format={"type": "json_object"}
    ).choices[0].message.content  # fmt: skip
    assert (text or "").startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_tools(server: Server, stream: bool) -> None:
    answer: Any = server.client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=60,
        temperature=1.0,
        seed=1,
        tools=[WEATHER],
        tool_choice="required",
        stream=stream,
    )
    if stream:
        choices = [choice for chunk in answer for choice in chunk.choices]
        assert choices[-1].finish_reason == "tool_calls"
        first, *others = [call.function for choice in choices for call in choice.delta.tool_calls or []]
        name, arguments = first.name, first.arguments + "".join(part.arguments for part in others)
    else:
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
        [call] = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert name == "weather" and json.loads(arguments)["city"] in ("Rome", "Oslo")


def test_sparsity_by_request(server: Server) -> None:
    def text(**extra: Any) -> str:
        return server.client.completions.create(
            model="tiny", prompt="The", temperature=0, max_tokens=40, extra_body={"ignore_eos": True, **extra}
        ).choices[0].text  # fmt: skip

    own, dense, half = text(), text(sparsity=0.0), text(sparsity=0.5, count_sparsity=True)
    assert len({own, dense, half}) == 3 and text(sparsity=0.3) == own
    found = json.loads(server.send("GET", "/sparsity")[1])
    assert found["plans"] == [0.0, 0.3, 0.5] and found["own"] == 0.3
    shares = [share for layer in found["achieved"] for share in layer.values()]
    assert len(shares) == 3 * 7 and all(0 <= share < 1 for share in shares) and 0.3 < sum(shares) / 21 < 0.7
    with pytest.raises(openai.BadRequestError, match=r"sparsity 0\.7 is not loaded; this server has 0, 0\.3, 0\.5"):
        text(sparsity=0.7)


def test_a_prefix_seen_before_is_not_computed_again(server: Server) -> None:
    words = "one two three four five six seven eight " * 20
    first, second = (
        server.client.completions.create(model="tiny", prompt=words[:n], temperature=0, max_tokens=8)
        for n in (300, 310)
    )
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= 64


def test_many_clients_get_their_own_answers(server: Server) -> None:
    """In CI against the tiny model; for the default model run python -m bench.load.

    Prompts are long enough that the time to a first token is the server's, not that of 32 clients in a process.
    """
    load = ("--requests", "300", "--prompts", "20", "--max-tokens", "16", "--words", "60")
    done = run_command("-m", "bench.load", "--url", f"http://127.0.0.1:{server.port}", *load, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["lost"] == figures["different"] == 0 and figures["hung_up"] > 10
    assert figures["metrics_first_token_s"] == pytest.approx(figures["first_token_s"], rel=0.25)


def test_bench_serving_counts_the_tokens_of_streams(tiny_folder: Path, tmp_path: Path) -> None:
    """Of a tiny model whose context outlasts a window: it makes thousands of tokens a second."""
    folder = shutil.copytree(tiny_folder, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}), encoding="utf-8")
    with serving(folder, "--sparsity", "0.3", "--sparsities", "0.5", "--name", "tiny") as server:

        def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
            window = ("--context", "8", "--clients", "1,3", "--seconds", "0.1")
            return run_command("-m", "bench.serving", "--url", f"http://127.0.0.1:{server.port}", *window, *arguments)

        done = run("--sparsities", "0.5", "--max-tokens", "19000")
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout.splitlines()[-1])["rows"]
        assert [row["clients"] for row in rows] == [1, 3]
        assert all(row["tokens_per_s"] > 20 and row["mean_context"] > 8 for row in rows)
        for arguments, message in (
            (("--max-tokens", "4"), "--max-tokens 4: a stream ended"),
            (("--sparsities", "0.7"), "sparsity 0.7 is not loaded"),
            (("--seconds", "0"), "--seconds 0.0 is out of range"),
        ):
            done = run(*arguments)
            err = done.stderr.decode()
            assert done.returncode != 0 and message in err and "Traceback" not in err, err
        server.wait_until(running=0)


def test_a_client_that_leaves_frees_its_slot(server: Server) -> None:
    for stream in (True, False):
        body = {"prompt": "The", "max_tokens": 380, "stream": stream, "ignore_eos": True, "n": 8}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        server.wait_until(running=8)
        assert connection.sock is not None
        connection.sock.close()
        connection.close()
        assert server.wait_until(running=0, waiting=0) < 2.0


def test_key_and_full_queue(tiny_folder: Path) -> None:
    with serving(tiny_folder, "--api-key", "secret", "--rows", "1", "--queue", "1") as server:
        status, text, _ = server.send("GET", "/v1/models")
        assert status == 401 and json.loads(text)["error"]["type"] == "authentication_error"
        assert server.send("GET", "/v1/models", headers={"Authorization": "Bearer secre"})[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert server.send("GET", "/v1/models", headers=key)[0] == 200
        body = json.dumps({"prompt": "The", "max_tokens": 300, "ignore_eos": True}).encode()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.send("POST", "/v1/completions", body, key), range(8)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 2
        assert all(headers["retry-after"] == "1" for status, _, headers in answers if status == 429)


def test_shutdown_lets_answers_finish(tiny_folder: Path) -> None:
    with serving(tiny_folder) as server:
        body = {"model": server.client.models.list().data[0].id, "prompt": "The", "max_tokens": 300, "temperature": 0}
        chunks = iter(server.client.completions.create(**body, stream=True, extra_body={"ignore_eos": True}))
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
        assert server.process.wait(20) in (0, -signal.SIGTERM)


def test_a_soak_ends_well_and_notices_what_is_wrong(
    tiny_folder: Path, call_main: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--minutes", "0", "--requests", "12", "--clients", "4", "--max-tokens", "8", "--")
    model = ("--checkpoint", tiny_folder, "--dtype", "fp32", "--device", "cpu")
    code, out, err = call_main(soak.main, *small, *model)
    assert code == 0, err
    figures = json.loads(out.splitlines()[-1])
    assert figures["rounds"] == 3 and figures["faults"] == 0 and figures["memory_mb"][0] > 50
    monkeypatch.setattr(soak, "GROWTH", -0.5)
    monkeypatch.setattr(soak, "BROKEN", (("/health", b"{}"), ("/v1/models", b"{}")))
    code, _, err = call_main(soak.main, *small, *model)
    assert code == 1 and "memory grew" in err
    code, _, err = call_main(soak.main, "--minutes", "0", "--", "--checkpoint", "/no/such/model")
    assert code == 1 and "/no/such/model" in err


def test_speculation_is_counted(tiny_folder: Path) -> None:
    with serving(tiny_folder, "--speculate", "3", "--draft-sparsity", "0.4", "--name", "tiny") as server:
        answer = server.client.completions.create(
            model="tiny", prompt="The", max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 30
        metrics = server.send("GET", "/metrics")[1].decode()
        drafted, accepted = (
            float(re.search(rf"^teal_{name}_tokens_total (\S+)$", metrics, re.MULTILINE)[1])  # type: ignore[index]
            for name in ("drafted", "accepted")
        )
        assert 0 < accepted <= min(drafted, 29)
