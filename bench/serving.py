"""Tokens/s through a running server while so many clients read streams: python -m bench.serving --clients 1,4,8

Counted by the server's /metrics within a window in which every stream runs, from first token to before the last. It is
the figure to hold beside a step's time by bench.decode --batch. The server may be vLLM's. Needs the openai package.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from teal.bench.load import scrape
from teal.cli import command_line as cli
from teal.errors import UserError

OURS = ("teal_generated_tokens_total", "teal_running")  # metrics of tokens so far, and of requests that get some
VLLM = ("vllm:generation_tokens_total", "vllm:num_requests_running")
SPARSITIES = (0.0, 0.5)  # asked of serve.py; vLLM has that of its start
SETTLE_S = 0.5  # after the last stream began: a grown cache has its steps captured anew


def build_parser() -> cli.Parser:
    """The command line of bench.serving."""
    parser = cli.Parser("Measure tokens/s through a running server, for several numbers of clients.")
    group = parser.add_argument_group("measurement")
    group.add_argument("--url", default="http://127.0.0.1:8000", help="where serve.py, or vLLM, listens")
    group.add_argument("--api-key", default="none", help="if the server wants one")
    group.add_argument("--clients", type=cli.positive_ints, default=(1, 4, 8), help="at once, commas between")
    group.add_argument(
        "--sparsities",
        type=cli.sparsities,
        help=f"of those that serve.py has loaded; {' and '.join(f'{s:g}' for s in SPARSITIES)} unless given",
    )
    group.add_argument("--context", type=cli.positive_int, default=512, help="prompt tokens of each client")
    group.add_argument("--seconds", type=float, default=1.5, help="the window's length")
    group.add_argument("--max-tokens", type=cli.positive_int, default=1536, help="must outlast the window")
    return parser


async def window(
    args: argparse.Namespace, client: Any, model: str, metrics: tuple[str, str], clients: int, sparsity: float | None
) -> dict[str, Any]:
    """tokens_per_s by the server's counter and chunks_per_s by the clients, who are told to leave at the end.

    metrics: OURS or VLLM. sparsity: to ask for, None for the server's own. mean_context is where the rows are in the
    middle of the window: bench.decode --context to compare with.
    """
    ended = UserError(f"--max-tokens {args.max_tokens}: a stream ended within the window; expected more tokens")
    began, chunks = [asyncio.Event() for _ in range(clients)], [0] * clients

    async def read(i: int) -> None:
        extra = {"ignore_eos": True} | ({} if sparsity is None else {"sparsity": sparsity})
        prompt = [5 + (i * 31 + j) % 200 for j in range(args.context)]
        common: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": args.max_tokens, "stream": True}
        async for _ in await client.completions.create(prompt=prompt, extra_body=extra, **common):
            began[i].set()
            chunks[i] += 1
        raise ended

    tokens_so_far, running = metrics

    async def count() -> tuple[float, float, float, float]:
        await asyncio.gather(*(event.wait() for event in began))
        await asyncio.sleep(min(SETTLE_S, args.seconds / 3))
        start, before, received = time.perf_counter(), scrape(args.url, args.api_key), sum(chunks)
        await asyncio.sleep(args.seconds)
        seconds, after = time.perf_counter() - start, scrape(args.url, args.api_key)
        if after[running] < clients:
            raise ended
        middle = args.context + (sum(chunks) + received) / 2 / clients
        return seconds, after[tokens_so_far] - before[tokens_so_far], sum(chunks) - received, middle

    readers, counted = [asyncio.create_task(read(i)) for i in range(clients)], asyncio.create_task(count())
    done, _ = await asyncio.wait((*readers, counted), return_when=asyncio.FIRST_COMPLETED)
    for task in (*readers, counted):
        if task not in done:
            task.cancel()
    await asyncio.gather(*readers, counted, return_exceptions=True)
    for task in done:
        task.result()  # raises what ended a stream early
    seconds, tokens, received, middle = counted.result()
    figures = {"tokens_per_s": tokens / seconds, "chunks_per_s": received / seconds, "mean_context": middle}
    return {"clients": clients, "sparsity": sparsity} | figures


async def run(
    args: argparse.Namespace, metrics: tuple[str, str], sparsities: Sequence[float | None]
) -> list[dict[str, Any]]:
    """A window for each number of clients and sparsity, each printed when it is over."""
    from openai import APIError, AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{args.url}/v1", api_key=args.api_key, max_retries=0, timeout=600) as client:
        model = (await client.models.list()).data[0].id
        rows = []
        for sparsity, clients in itertools.product(sparsities, args.clients):
            try:
                rows.append(await window(args, client, model, metrics, clients, sparsity))
            except APIError as error:
                raise UserError(f"--url {args.url}: {error}") from None
            print_row(rows[-1])
        return rows


def print_row(row: dict[str, Any]) -> None:
    figures = f"{row['tokens_per_s']:9.1f} tok/s {row['chunks_per_s']:9.1f} chunks/s"
    label = "    " if row["sparsity"] is None else f"{row['sparsity']:4.0%}"
    print(f"{label} {row['clients']:3} clients {figures}  at context {row['mean_context']:.0f}", flush=True)


def main() -> None:
    """Measure and print; the last line is JSON."""
    args = build_parser().parse_args()
    if not 0 < args.seconds < 60:
        raise UserError(f"--seconds {args.seconds} is out of range; expected 0 < seconds < 60")
    try:
        found = scrape(args.url, args.api_key)
    except OSError as error:
        raise UserError(f"--url {args.url}: no server answers ({error}); start serve.py") from None
    metrics = next((names for names in (OURS, VLLM) if names[0] in found), None)
    if metrics is None:
        raise UserError(f"--url {args.url}: its /metrics are neither serve.py's nor vLLM's")
    if metrics is VLLM and args.sparsities is not None:
        raise UserError(f"--sparsities {args.sparsities}: vLLM has that of its start; leave it out")
    rows = asyncio.run(run(args, metrics, (None,) if metrics is VLLM else args.sparsities or SPARSITIES))
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    cli.run(main)
