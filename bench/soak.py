"""A server under load for hours: python -m bench.soak --minutes 120 -- --sparsity 0.5

Starts serve.py with the options after --, and attacks it in rounds as bench.load does, with broken requests in between.
After each round no answer may be lost or other than its prompt's alone, and no slot may be taken. Nor may memory have
grown since the warm-up. At last the server gets SIGTERM and must end by itself. Needs the openai package.
"""

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import IO, Any

from teal.bench import load
from teal.cli import command_line as cli
from teal.errors import UserError

READY_S = 600  # until it listens: compilation on a GPU
GROWTH = 0.1  # of resident memory after the warm-up, that allocators may take
WARM_UP = 2  # rounds
BROKEN: tuple[tuple[str, bytes], ...] = (
    ("/v1/chat/completions", b"{"),
    ("/v1/chat/completions", b'{"messages": "no list"}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}'),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}'),
    ("/v1/completions", b'{"prompt": ""}'),
    ("/v1/completions", b'{"prompt": "x", "model": "another"}'),
    ("/v1/completions", b"\xff\xfe\x00"),
    ("/v1/completions", json.dumps({"prompt": "word " * 700_000}).encode()),
    ("/v1/completions", b'{"prompt": "x", "a": [' + b"[]," * 900_000 + b"1]}"),
    ("/v1/nothing", b"{}"),
)


def build_parser() -> cli.Parser:
    """The command line of bench.soak."""
    parser = cli.Parser("Keep a server under load for a long time and check that it stays as it was.")
    group = parser.add_argument_group("load")
    group.add_argument("--minutes", type=float, default=120.0, help="in all, the warm-up included")
    group.add_argument("--requests", type=cli.positive_int, default=200, help="a round")
    group.add_argument("--clients", type=cli.positive_int, default=16, help="at once")
    group.add_argument("--max-tokens", type=cli.positive_int, default=24, help="longest answer")
    group.add_argument("options", nargs=argparse.REMAINDER, help="-- and then options of serve.py")
    return parser


def start(options: list[str], errors: IO[str]) -> tuple["subprocess.Popen[str]", str]:
    """A server that writes to errors, and its URL. Raises UserError with its last words if it ends too soon."""
    command = [sys.executable, "-m", "teal.cli.serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=errors, text=True)
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"http://\S+?:\d+", words_of(errors)):
            with suppress(OSError):
                urllib.request.urlopen(f"{found[0]}/health", timeout=5)
                return process, found[0]
        time.sleep(0.2)
    process.kill()
    raise UserError(f"serve.py is not there after {READY_S} s or has ended: {words_of(errors)[-500:]}")


def words_of(errors: IO[str]) -> str:
    """All that the server has written so far; its place in the file, which it shares, stays at the end."""
    return Path(errors.name).read_text(encoding="utf-8")


def resident_mb(process: "subprocess.Popen[str]") -> float:
    """Resident memory of a process, MB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1e3


def send_broken(url: str) -> list[str]:
    """Send every broken request; those not answered by a status from 400 to 499."""
    wrong = []
    for path, body in BROKEN:
        request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
        try:
            status = urllib.request.urlopen(request, timeout=30).status
        except urllib.error.HTTPError as error:
            status = error.code
        if not 400 <= status < 500:
            wrong.append(f"{path} {body!r}: status {status}")
    return wrong


async def soak(args: argparse.Namespace, process: "subprocess.Popen[str]", url: str) -> dict[str, Any]:
    """Rounds until the time is over; figures of all of them."""
    from openai import AsyncOpenAI

    end = time.monotonic() + 60 * args.minutes
    attack = argparse.Namespace(requests=args.requests, clients=args.clients, hang_up=0.1)
    faults: list[str] = []
    memory: list[float] = []
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        prompts = load.make_prompts(20, 60, args.max_tokens)
        alone = [(await load.ask(client, model, prompt, stream=False))[0] for prompt in prompts]
        while len(memory) <= WARM_UP or time.monotonic() < end:
            outcome = await load.attack(attack, client, model, prompts, alone)
            faults += outcome.lost + outcome.different + await asyncio.to_thread(send_broken, url)
            if not await load.wait_until_idle(url, "none"):
                faults.append(f"round {len(memory)}: a slot stayed taken")
            memory.append(resident_mb(process))
            print(
                f"round {len(memory)}: {outcome.tokens} tokens, {memory[-1]:.0f} MB, {len(faults)} faults", flush=True
            )
    if memory[-1] > (1 + GROWTH) * memory[WARM_UP]:
        faults.append(f"memory grew from {memory[WARM_UP]:.0f} to {memory[-1]:.0f} MB")
    figures = {"rounds": len(memory), "requests": len(memory) * (args.requests + len(BROKEN))}
    return figures | {"memory_mb": [memory[WARM_UP], memory[-1]], "faults": len(faults), "examples": faults[:5]}


def main() -> None:
    """Soak and print; the last line is JSON. Exits with 1 if anything was wrong."""
    args = build_parser().parse_args()
    if not args.minutes >= 0:
        raise UserError(f"--minutes {args.minutes} is out of range; expected a number >= 0")
    with tempfile.NamedTemporaryFile("w", suffix=".log") as errors:
        process, url = start([option for option in args.options if option != "--"], errors)
        try:
            figures = asyncio.run(soak(args, process, url))
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            process.kill()
        words = words_of(errors)
    figures["traceback"] = "Traceback" in words
    print(json.dumps(figures | {"date": date.today().isoformat(), "argv": sys.argv[1:]}))
    if figures["faults"] or figures["traceback"] or process.returncode != 0:
        raise UserError(
            f"{figures['faults']} faults, exit status {process.returncode}: {figures['examples']} {words[-500:]}"
        )


if __name__ == "__main__":
    cli.run(main)
