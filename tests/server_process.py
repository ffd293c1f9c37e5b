"""serve.py as a process on a free port, and what to ask of it."""

import http.client
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tests.conftest import ROOT
from tests.forked import Forked

QUESTION = [{"role": "user", "content": "The European lobster"}]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip


@dataclass
class Server:
    """A running server process."""

    process: Forked
    log: Path  # of what it writes to stderr
    port: int

    @property
    def client(self) -> Any:  # an openai.OpenAI, whose overloads take no dictionaries
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="k", max_retries=0, timeout=60)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, body, {**content, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        return json.loads(self.send("GET", "/health")[1])

    def wait_until(self, **wanted: int) -> float:
        """Seconds until /health says so; fails after ten."""
        start = time.monotonic()
        while time.monotonic() - start < 10:
            if wanted.items() <= self.health().items():
                return time.monotonic() - start
            time.sleep(0.01)
        raise AssertionError(f"{self.health()} instead of {wanted}")


@contextmanager
def listening(folder: Path, *options: str, program: tuple[str, ...] = ("serve.py",)) -> Iterator[tuple[Forked, Path]]:
    """A server of this checkpoint that says where it listens, and the file of what it writes to stderr."""
    with tempfile.NamedTemporaryFile(suffix=".log") as file:
        log, end = Path(file.name), time.monotonic() + 60
        arguments = (*program, "--checkpoint", str(folder), "--port", "0", "--dtype", "fp32", *options)
        process = Forked(ROOT, arguments, os.environ, stderr=log)
        try:
            while " at http" not in log.read_text():
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.02)
            yield process, log
        finally:
            process.kill()
            process.wait()


@contextmanager
def serving(folder: Path, *options: str, program: tuple[str, ...] = ("serve.py",)) -> Iterator[Server]:
    """A server of this checkpoint that answers."""
    with listening(folder, *options, program=program) as (process, log):
        found = re.search(r" at http://127\.0\.0\.1:(\d+)/", log.read_text())
        assert found is not None, log.read_text()
        server = Server(process, log, int(found[1]))
        server.wait_until(running=0)
        yield server
