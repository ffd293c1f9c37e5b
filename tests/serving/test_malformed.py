"""Bodies, paths and options that are wrong get an error each, and the server stays up."""

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import assert_one_line_error, run_command
from tests.server_process import QUESTION, Server

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
GOOD_CHAT: dict[str, Any] = {"messages": QUESTION, "max_tokens": 2}
GOOD_PLAIN: dict[str, Any] = {"prompt": "The", "max_tokens": 2}
WRONG_FIELDS: dict[str, list[Any]] = {
    "temperature": ["1", -1, 3, [], {}, True],
    "top_p": [-0.1, 1.1, "x"],
    "n": [0, 9, 1.5, "2", True],
    "max_tokens": [0, -5, "9", 1.5],
    "stop": [5, [5], ["a"] * 17, {}],
    "seed": ["s", 1.5, 2**63],
    "stream": ["yes", 1],
    "top_k": [-2, 0.5],
    "min_p": [1, -0.1],
    "presence_penalty": [-3, "1"],
    "frequency_penalty": [2.5, []],
    "sparsity": [1, -0.1, 0.77, "0.5"],
    "model": [5, "gpt-9"],
    "logit_bias": [5, {"x": 1}, {"1": 101}, {"1": "1"}, {"-1": 1}, {"99999": 1}],
    "stream_options": [5, {"include_usage": "y"}],
    "repetition_penalty": [0, -1],
}
WRONG_MESSAGES: tuple[Any, ...] = (
    5,
    [],
    "x",
    [5],
    [{}],
    [{"role": "user"}] * 5000,
    [{"role": "king", "content": "x"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
)
WRONG_EXTRAS: tuple[dict[str, Any], ...] = (
    {"tools": 5},
    {"tools": [{}]},
    {"tool_choice": "required"},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "xml"}},
    {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 21},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
)
NO_JSON = (
    b"[" * 100_000,
    b'{"a":' * 200 + b"1" + b"}" * 200,
    b"\xff\xfe\x00",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b"x" * 1_500_000,
)


def random_value(chance: random.Random, depth: int = 0) -> Any:
    kinds: list[Any] = [None, True, -1, 0, 1, 1e308, -1e308, 10**30, "", "x" * 50, "\ud800", "🙂", [], {}, 0.5]
    if depth < 3 and chance.random() < 0.3:
        inner = [random_value(chance, depth + 1) for _ in range(chance.randint(0, 3))]
        return inner if chance.random() < 0.5 else {str(i): value for i, value in enumerate(inner)}
    return chance.choice(kinds)


def malformed_bodies(count: int) -> Iterator[tuple[str, bytes]]:
    """(path, body) that no server should accept, each for another reason or at another place; count with chance."""
    for field, values in WRONG_FIELDS.items():
        for value in values:
            for path, good in ((CHAT, GOOD_CHAT), (PLAIN, GOOD_PLAIN)):
                yield path, json.dumps({**good, field: value}).encode()
    for value in WRONG_MESSAGES:
        yield CHAT, json.dumps({**GOOD_CHAT, "messages": value}).encode()
    for value in (5, [], {}, [[]], [-1], [10**9], [1.5], "", "x" * 5000, [["a"]]):
        yield PLAIN, json.dumps({**GOOD_PLAIN, "prompt": value}).encode()
    for extra in WRONG_EXTRAS:
        yield CHAT, json.dumps({**GOOD_CHAT, **extra}).encode()
    for body in NO_JSON:
        yield PLAIN, body
    chance = random.Random(0)
    whole = json.dumps(GOOD_CHAT).encode()
    for i in range(count):
        yield CHAT, whole[: chance.randrange(len(whole))]
        messages = random_value(chance)
        if not isinstance(messages, list) or not messages:
            yield CHAT, json.dumps({**GOOD_CHAT, "messages": messages}).encode()
        yield PLAIN, json.dumps([random_value(chance)] if i % 2 else chance.choice(["x", 5, None])).encode()


def test_malformed_bodies_get_an_error_and_the_server_stays_up(server: Server) -> None:
    bodies = list(malformed_bodies(180))
    assert len(bodies) >= 500
    for path, body in bodies:
        status, text, _ = server.send("POST", path, body)
        assert 400 <= status < 500, (path, body[:300], status, text)
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], (body[:300], text)
    assert server.health() == {"status": "ok", "waiting": 0, "running": 0}
    assert server.client.completions.create(model="tiny", prompt="The", max_tokens=2).usage.completion_tokens


def test_unknown_paths_and_methods(server: Server) -> None:
    for method, path, expected in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/health", 405),
    ):
        status, text, _ = server.send(method, path)
        assert status == expected and json.loads(text)["error"]["message"]


def test_mistakes_at_the_start_are_one_line(tiny_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for options, fragments in (
            (["--port", str(taken.getsockname()[1])], ("--port", "in use")),
            (["--port", "70000"], ("--port 70000", "65535")),
            (["--rows", "9", "--port", "0"], ("--rows 9", "1 to 8")),
            (["--sparsities", "1.5"], ("1.5",)),
            (["--speculate", "99"], ("--speculate 99", "1 to 16")),
            (["--speculate", "4", "--sparsity", "0.5"], ("--sparsity", "dense model's")),
            (["--draft-quant", "int4"], ("--draft-quant", "--speculate K")),
        ):
            done = run_command("-m", "serve", "--checkpoint", tiny_folder, *options)
            assert_one_line_error(done.returncode, done.stderr.decode(), *fragments)
