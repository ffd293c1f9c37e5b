"""The end of the server: answers end well, whoever waits is told, and a second signal ends it at once."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teal.cli import serve
from teal.decoding.scheduler import Scheduler
from teal.errors import UserError
from tests.conftest import ROOT
from tests.server_process import Server, serving

JSON = {"Content-Type": "application/json"}
LONG = {"prompt": "The", "max_tokens": 390, "ignore_eos": True}


def post(server: Server, body: dict[str, Any]) -> http.client.HTTPConnection:
    """A connection on which a request has been sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    return connection


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def test_running_streams_end_and_waiting_requests_are_refused(tiny_folder: Path) -> None:
    with serving(tiny_folder, "--rows", "1", "--drain-seconds", "1") as server:
        running = post(server, {**LONG, "n": 8, "stream": True}).getresponse()
        assert running.readline().startswith(b"data: ")
        waiting = [post(server, {**LONG, "stream": stream}) for stream in (True, False)]
        half_sent = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        half_sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        half_sent.sendall(b"Content-Type: application/json\r\n\r\n{")
        server.wait_until(running=1, waiting=9)
        server.process.send_signal(signal.SIGTERM)
        for connection in waiting:
            answer = connection.getresponse()
            assert answer.status == 503 and answer.getheader("Retry-After")
            assert "stopping" in json.loads(answer.read())["error"]["message"]
        assert b"503" in half_sent.recv(65536)
        *_, last, done = events(running.read().decode())
        assert done == "[DONE]" and json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0
        assert len(server.log.read_text().splitlines()) == 2  # what loading took, and where it listened


def test_a_client_that_does_not_read_does_not_hold_up_the_end(tiny_folder: Path) -> None:
    with serving(tiny_folder, "--drain-seconds", "1") as server:
        body = json.dumps({**LONG, "logprobs": 5, "n": 8, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(30) == 0
        assert len(server.log.read_text().splitlines()) == 2


def test_a_second_interrupt_ends_at_once(tiny_folder: Path) -> None:
    with serving(tiny_folder, "--drain-seconds", "60", "--rows", "1") as server:
        running = post(server, {**LONG, "n": 8, "stream": True}).getresponse()
        assert running.readline()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None  # the first lets it finish
        start = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) in (130, -signal.SIGINT)
        assert time.monotonic() - start < 1.5
        assert len(server.log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("signals", "codes"),
    [
        ([signal.SIGINT], (130,)),
        ([signal.SIGTERM], (143, -signal.SIGTERM)),
        ([signal.SIGINT, signal.SIGINT], (130, -signal.SIGINT)),
    ],
    ids=["interrupt", "terminate", "two interrupts"],
)
@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_a_signal_while_the_model_is_loading(
    signals: list[signal.Signals], codes: tuple[int, ...], delay: float
) -> None:
    command = [sys.executable, "serve.py", "--random-weights", "Llama-2-7B", "--port", "0", "--dtype", "bf16"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    time.sleep(delay)
    start = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.05)
    _, err = process.communicate(timeout=20)
    assert process.returncode in codes and "Traceback" not in err, err
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "\ninterrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_while_a_module_is_imported(tmp_path: Path, number: int, code: int, said: str) -> None:
    """Raised within torch's import, SystemExit was taken for an error of C++, which aborts."""
    (tmp_path / "slow.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {number})\nexcept BaseException as error:\n    print(error)\n"
    )
    program = "from teal.serving.shutdown import Shutdown\nShutdown()\nimport slow\nprint('went on')"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", said)


def test_clients_are_let_in_when_all_is_compiled(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, call_main: Callable[..., tuple[int, str, str]]
) -> None:
    listener = serve.open_listener("127.0.0.1", 0)
    monkeypatch.setattr(serve, "open_listener", lambda *_: listener)
    monkeypatch.setattr(serve, "Shutdown", lambda: None)  # which would keep this process's signals

    def warm(_: Scheduler) -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(listener.getsockname())
        raise UserError("seen")

    monkeypatch.setattr(Scheduler, "warm", warm)
    with listener:
        code, out, err = call_main(serve.main, "--checkpoint", tiny_folder, "--device", "cpu")
    assert (code, out) == (1, "") and err.splitlines()[-1] == "error: seen"
