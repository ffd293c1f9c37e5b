"""What strangers and browsers can do to the server: half-sent requests, other sites' pages, other names, wrong keys."""

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.conftest import assert_one_line_error, run_command
from tests.server_process import Server, listening, serving

PLAIN = "/v1/completions"
BODY = json.dumps({"prompt": "The", "max_tokens": 2}).encode()
JSON = "Content-Type: application/json\r\n"


def connect(server: Server, content: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(content)
    return connection


def head(method: str = "POST", path: str = PLAIN, host: str = "localhost", fields: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n".encode()


def read_answer(connection: socket.socket) -> tuple[int, str]:
    """Status and all that follows it, until the server closes the connection."""
    content = b""
    while part := connection.recv(65536):
        content += part
    text = content.decode()
    return int(text.split(" ")[1]) if text else 0, text


def ask(server: Server, method: str, path: str, **fields: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of a request with these header fields."""
    headers = {name.replace("_", "-"): value for name, value in fields.items()}
    status, body, found = server.send(method, path, BODY if method == "POST" else None, headers)
    return status, found, body.decode()


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    options = ("--allow-origin", "https://good.example", "--allow-host", "box.example")
    with serving(tiny_folder, "--name", "tiny", *options) as running:
        yield running


@pytest.fixture(scope="module")
def strict(tiny_folder: Path) -> Iterator[Server]:
    options = ("--client-seconds", "2", "--connections", "8", "--max-held-mb", "2", "--max-body-mb", "1")
    with serving(tiny_folder, "--name", "tiny", *options) as running:
        yield running


UNFINISHED = {
    "nothing": b"",
    "half a line": b"POST /v1/comp",
    "half a header": head()[:-2] + b"X: y",
    "half a body": head(fields=JSON + "Content-Length: 100\r\n") + b'{"prompt": ',
    "half a chunk": head(fields=JSON + "Transfer-Encoding: chunked\r\n") + b"5\r\n{",
}


def test_a_request_that_does_not_arrive_is_given_up(strict: Server) -> None:
    """Of each kind one, all waiting at once."""

    def give_up(sent: bytes) -> tuple[int, str, float]:
        start = time.monotonic()
        with connect(strict, sent) as connection:
            return *read_answer(connection), time.monotonic() - start

    with ThreadPoolExecutor(len(UNFINISHED)) as pool:
        answers = list(pool.map(give_up, UNFINISHED.values()))
    for kind, (status, text, seconds) in zip(UNFINISHED, answers, strict=True):
        assert status == 408 and "within 2 s" in text and "Connection: close" in text, kind
        assert 1.5 < seconds < 15, kind


def test_a_body_that_trickles_in_is_given_up_too(strict: Server) -> None:
    start = time.monotonic()
    with connect(strict, head(fields=JSON + "Content-Length: 1000\r\n")) as connection:
        with suppress(OSError):
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.1)
    assert time.monotonic() - start < 8


def test_a_client_that_does_not_take_its_answers_loses_them(strict: Server) -> None:
    count = 2000  # 20 MB, more than the sockets' buffers take
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", strict.port))
        connection.sendall(head("GET", "/web/app.js") * count)
        time.sleep(4)  # twice what a client has to take more of its answers
        content = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                content += part
    assert 0 < content.count(b"HTTP/1.1 200") < count


def test_a_request_in_time_is_answered_and_the_connection_kept(strict: Server) -> None:
    fields = JSON + f"Content-Length: {len(BODY)}\r\n"
    with connect(strict) as connection:
        for _ in range(2):
            for part in (head(fields=fields)[:20], head(fields=fields)[20:], BODY[:5], BODY[5:]):
                connection.sendall(part)
                time.sleep(0.2)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_connections_are_bounded(strict: Server) -> None:
    with ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(connect(strict, b"GET /heal"))
        time.sleep(0.2)
        status, body, headers = strict.send("GET", "/health")
        assert status == 503 and headers["retry-after"] and b"too many connections" in body
    time.sleep(0.2)
    assert strict.health()["status"] == "ok"


def test_bytes_of_all_bodies_are_bounded(strict: Server) -> None:
    """Of 2 MB, three clients hold 1.8; half-sent bodies held 2.7 GB."""
    start = head(fields=JSON + "Content-Length: 900000\r\n")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(strict, start + b" " * 600_000))
        time.sleep(0.5)
        status, body, headers = strict.send("POST", PLAIN, b" " * 500_000)
        assert status == 503 and headers["retry-after"] and b"2000000 bytes" in body
    time.sleep(0.3)
    assert strict.send("POST", PLAIN, BODY)[0] == 200


def test_a_body_too_large_is_refused_before_it_is_sent(strict: Server) -> None:
    with connect(strict, head(fields=JSON + "Content-Length: 1000001\r\n")) as connection:
        start = time.monotonic()
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
        assert time.monotonic() - start < 1.5
    with connect(strict, head(fields=JSON + "Transfer-Encoding: chunked\r\n")) as connection:
        for _ in range(11):
            connection.sendall(b"186a0\r\n" + b" " * 100_000 + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_what_is_no_http_gets_an_error_in_json(strict: Server) -> None:
    for sent in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", head(fields="X: " + "y" * 100_000 + "\r\n")):
        with connect(strict, sent) as connection:
            text = connection.recv(65536).decode()
        assert text.startswith("HTTP/1.1 400") and json.loads(text.partition("\r\n\r\n")[2])["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_a_form_of_another_site_is_no_request(server: Server, kind: str) -> None:
    status, _, body = ask(server, "POST", PLAIN, Content_Type=kind)
    assert status == 415 and "application/json" in body


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/ld+json"])
def test_json_has_several_names(server: Server, kind: str) -> None:
    assert ask(server, "POST", PLAIN, Content_Type=kind)[0] == 200


def test_compressed_bodies_are_refused_by_name(server: Server) -> None:
    status, _, body = ask(server, "POST", PLAIN, Content_Encoding="gzip")
    assert status == 415 and "Content-Encoding: gzip" in body


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:80", "[::1]:8000", "box.example", "localhost."]
)
def test_names_of_this_server(server: Server, host: str) -> None:
    assert ask(server, "GET", "/health", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "192.0.2.7", "[", "", "a b"]
)
def test_other_names_are_refused(server: Server, host: str) -> None:
    """A site that has pointed its name at 127.0.0.1 must not read answers."""
    for method, path in (("GET", "/health"), ("GET", "/"), ("POST", PLAIN)):
        status, _, body = ask(server, method, path, Host=host)
        assert status == 403 and "--allow-host" in body


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    own = f"127.0.0.1:{server.port}"
    for origin in (f"http://{own}", f"HTTP://{own}", "https://good.example"):
        assert ask(server, "POST", PLAIN, Origin=origin, Host=own)[0] == 200
    for origin in (
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"http://localhost:{server.port}",
        "https://good.example.evil",
    ):
        status, headers, body = ask(server, "POST", PLAIN, Origin=origin, Host=own)
        assert status == 403 and f"--allow-origin {origin}" in body and "access-control-allow-origin" not in headers


def test_pages_that_are_allowed_can_ask_and_read(server: Server) -> None:
    good = "https://good.example"
    wanted = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    status, headers, _ = ask(server, "OPTIONS", PLAIN, Origin=good, **wanted)
    assert status == 200 and headers["access-control-allow-origin"] == good
    assert "POST" in headers["access-control-allow-methods"]
    assert "content-type" in headers["access-control-allow-headers"]
    assert ask(server, "OPTIONS", PLAIN, Origin="https://evil.example", **wanted)[0] == 403
    assert ask(server, "GET", "/v1/models", Origin=good)[1]["access-control-allow-origin"] == good
    status, headers, _ = ask(server, "POST", PLAIN, Origin=good, Content_Type="text/plain")
    assert status == 415 and headers["access-control-allow-origin"] == good  # so that the page can read the error


def test_methods(server: Server) -> None:
    for method, path, allowed in (
        ("GET", PLAIN, "OPTIONS, POST"),
        ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
        ("DELETE", "/health", "GET, HEAD, OPTIONS"),
        ("PUT", "/web/app.js", "GET, HEAD, OPTIONS"),
    ):
        status, headers, body = ask(server, method, path)
        assert status == 405 and headers["allow"] == allowed and json.loads(body)["error"]["message"]
        status, headers, body = ask(server, "OPTIONS", path)
        assert status == 204 and headers["allow"] == allowed and not body
    for path in ("/", "/health", "/v1/models", "/web/app.js"):
        status, headers, body = ask(server, "HEAD", path)
        assert status == 200 and int(headers["content-length"]) > 0 and not body
    assert ask(server, "OPTIONS", "/nothing")[0] == 404


def test_with_a_key_any_name_will_do_and_bearer_in_any_case(tiny_folder: Path) -> None:
    with serving(tiny_folder, "--api-key", "secret") as server:
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert ask(server, "GET", "/v1/models", Authorization=f"{scheme} secret", Host="any.example")[0] == 200
        for given in ("secret", "Basic secret", "Bearer", "Bearer Secret", "Bearer s\xe9cret"):
            status, headers, _ = ask(server, "GET", "/v1/models", Authorization=given)
            assert status == 401 and headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("options", "key", "fragments"),
    [
        (["--api-key", "schlüssel"], None, ("--api-key", "ASCII")),
        (["--api-key", "two words"], None, ("--api-key", "without spaces")),
        (["--api-key", ""], None, ("--api-key is empty",)),
        ([], "", ("TEAL_API_KEY is empty",)),
        ([], "ключ", ("TEAL_API_KEY", "ASCII")),
        (["--allow-origin", "example.org"], None, ("--allow-origin example.org", "https://example.org")),
        (["--allow-origin", "https://example.org/page"], None, ("--allow-origin https://example.org/page",)),
    ],
)
def test_what_no_client_can_send_is_refused_at_start(
    options: list[str], key: str | None, fragments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None:
        monkeypatch.setenv("TEAL_API_KEY", key)
    done = run_command("-m", "serve", "--checkpoint", "/no/such/model", "--port", "0", *options)
    assert_one_line_error(done.returncode, done.stderr.decode(), *fragments)


def first_lines(folder: Path, *options: str) -> str:
    """What the server writes until it listens."""
    with listening(folder, *options) as (_, log):
        return log.read_text()


def test_listening_on_all_networks_without_a_key_warns(tiny_folder: Path) -> None:
    assert re.match(r"warning: --host 0\.0\.0\.0 without --api-key", first_lines(tiny_folder, "--host", "0.0.0.0"))
    assert "warning" not in first_lines(tiny_folder, "--host", "0.0.0.0", "--api-key", "k")
    assert "warning" not in first_lines(tiny_folder)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_an_ipv6_address_is_printed_in_brackets(tiny_folder: Path) -> None:
    assert re.search(r"at http://\[::1\]:\d+/ ", first_lines(tiny_folder, "--host", "::1"))
