"""Many clients at once against a running server: python -m bench.load --url http://127.0.0.1:8000 --requests 1000

First every prompt alone, then all of them from many clients, some of which hang up midway. An answer that is lost or is
not the one that the prompt got alone is an error. So are a slot that stays taken and figures of /metrics that differ
from what the clients measured. On a GPU texts may part beside others (docs/determinism.md): with --may-part only one
that another prompt has alone is an error. Needs the openai package.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from teal.cli import command_line as cli
from teal.errors import UserError

SUBJECTS = ("cats", "Rome", "the sea", "bread", "winter", "a train", "chess", "the moon", "tea", "a garden")
TOLERANCE = 0.1  # between /metrics and the clients


def build_parser() -> cli.Parser:
    """The command line of bench.load."""
    parser = cli.Parser("Load a running server with many clients and check every answer.")
    group = parser.add_argument_group("load")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="where serve.py listens")
    group.add_argument("--api-key", default="none", help="if the server wants one")
    group.add_argument("--requests", type=cli.positive_int, default=1000, help="in all")
    group.add_argument("--clients", type=cli.positive_int, default=32, help="at once")
    group.add_argument("--prompts", type=cli.positive_int, default=40, help="different ones")
    group.add_argument(
        "--max-tokens", type=cli.positive_int, default=32, help="longest answer; the shortest is a quarter"
    )
    group.add_argument("--words", type=cli.positive_int, default=150, help="of the longest prompts")
    group.add_argument("--hang-up", type=float, default=0.1, help="share of clients that leave midway")
    group.add_argument(
        "--may-part",
        action="store_true",
        help="a text may leave the one its prompt has alone, as on a GPU; only another prompt's is an error",
    )
    return parser


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question and how long its answer may get."""

    text: str
    max_tokens: int


@dataclass(slots=True)
class Outcome:
    """What the clients saw."""

    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    swapped: int = 0  # of the different ones: those that another prompt has alone
    hung_up: int = 0
    first_token_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def make_prompts(count: int, words: int, max_tokens: int) -> list[Prompt]:
    """Prompts of mixed lengths, some of which begin alike."""
    chance = random.Random(0)
    found = []
    for i in range(count):
        filler = " ".join(chance.choices(SUBJECTS, k=chance.choice((1, words // 30 or 1, words // 4 or 1, words))))
        subject = SUBJECTS[i % len(SUBJECTS)]
        found.append(
            Prompt(
                f"Here is a list: {filler}. Question {i}: what about {subject}?",
                chance.randint(max_tokens // 4 or 1, max_tokens),
            )
        )
    return found


async def ask(
    client: Any, model: str, prompt: Prompt, stream: bool, leave_after: int | None = None
) -> tuple[str | None, int, float]:
    """(text or None if we left, its tokens, seconds to the first text)."""
    start = time.monotonic()
    common: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": prompt.max_tokens}
    common["messages"] = [{"role": "user", "content": prompt.text}]
    if not stream:
        answer = await client.chat.completions.create(**common)
        return answer.choices[0].message.content, answer.usage.completion_tokens, 0.0
    chunks = await client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True})
    text, tokens, first, count = "", 0, 0.0, 0
    async for chunk in chunks:
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            piece = choice.delta.content or ""
            if piece and not first:
                first = time.monotonic() - start
            text += piece
            count += bool(piece)
        if leave_after is not None and count >= leave_after:
            await chunks.close()
            return None, 0, first
    return text, tokens, first


async def attack(
    args: argparse.Namespace, client: Any, model: str, prompts: list[Prompt], alone: list[str | None]
) -> Outcome:
    """All requests from so many clients at once."""
    outcome, chance = Outcome(), random.Random(1)
    numbers = iter(range(args.requests))
    start = time.monotonic()

    async def worker() -> None:
        for number in numbers:
            i = chance.randrange(len(prompts))
            leave = chance.randint(0, 3) if chance.random() < args.hang_up else None
            stream = leave is not None or number % 2 == 0
            try:
                text, tokens, first = await ask(client, model, prompts[i], stream, leave)
            except Exception as error:
                outcome.lost.append(f"request {number}: {type(error).__name__}: {error}")
                continue
            if text is None:
                outcome.hung_up += 1
                continue
            outcome.tokens += tokens
            if first:
                outcome.first_token_s.append(first)
            if text != alone[i]:
                outcome.different.append(f"request {number}: {text!r} instead of {alone[i]!r}")
                outcome.swapped += text in alone

    await asyncio.gather(*(worker() for _ in range(args.clients)))
    outcome.seconds = time.monotonic() - start
    return outcome


def scrape(url: str, key: str) -> dict[str, float]:
    """The server's metrics by name; those of several labels are added up."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"})
    text = urllib.request.urlopen(request, timeout=10).read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


async def wait_until_idle(url: str, key: str) -> bool:
    """Whether no request is left running or waiting, within five seconds."""
    for _ in range(50):
        found = scrape(url, key)
        if found["teal_running"] == 0 == found["teal_waiting"]:
            return True
        await asyncio.sleep(0.1)
    return False


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both phases, and the server's figures of the second beside the clients'."""
    from openai import APIError, AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.api_key, max_retries=0, timeout=600)
    async with client:
        prompts = make_prompts(args.prompts, args.words, args.max_tokens)
        try:
            model = (await client.models.list()).data[0].id
            alone = [(await ask(client, model, prompt, stream=False))[0] for prompt in prompts]
        except APIError as error:
            raise UserError(f"--url {args.url}: {error}") from None
        before = scrape(args.url, args.api_key)
        outcome = await attack(args, client, model, prompts, alone)
        idle = await wait_until_idle(args.url, args.api_key)
        after = scrape(args.url, args.api_key)
    change = {name: after[name] - before.get(name, 0.0) for name in after}
    answered = change["teal_first_token_seconds_count"]
    first = statistics.mean(outcome.first_token_s) if outcome.first_token_s else 0.0
    return {
        "requests": args.requests,
        "hung_up": outcome.hung_up,
        "lost": len(outcome.lost),
        "different": len(outcome.different),
        "swapped": outcome.swapped,
        "examples": (outcome.lost + outcome.different)[:3],
        "idle_at_the_end": idle,
        "seconds": outcome.seconds,
        "tokens_per_s": outcome.tokens / outcome.seconds,
        "metrics_tokens_per_s": change["teal_generated_tokens_total"] / outcome.seconds,
        "first_token_s": first,
        "metrics_first_token_s": change["teal_first_token_seconds_sum"] / max(1.0, answered),
    }  # fmt: skip


def main() -> None:
    """Run and print; the last line is JSON. Raises UserError if an answer was lost or another's."""
    args = build_parser().parse_args()
    if not 0 <= args.hang_up < 1:
        raise UserError(f"--hang-up {args.hang_up} is out of range; expected 0 <= share < 1")
    try:
        scrape(args.url, args.api_key)
    except OSError as error:
        raise UserError(f"--url {args.url}: no server answers ({error}); start serve.py") from None
    figures = asyncio.run(run(args))
    for name, value in figures.items():
        print(f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}")
    print(json.dumps(figures))
    wrong = figures["swapped" if args.may_part else "different"]
    if figures["lost"] or wrong or not figures["idle_at_the_end"]:
        print("error: answers were lost or mixed up, or a slot stayed taken", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
