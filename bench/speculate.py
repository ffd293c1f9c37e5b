"""Speculative decoding by draft and length: python -m bench.speculate --drafts 0.5,int4:0.5,lookup --lengths 1,2,4

For each draft and number of drafted tokens: how many of them the dense model takes, and the tokens and milliseconds of
a round. Also the speed over plain dense decoding of the same prompts in the same process, and how many texts are the
dense ones. Of the others, by how little the dense model preferred its token to the draft's where they part.

Random weights tell the time of a round only. --acceptances then says what that gives for a draft whose tokens are
taken so often. That is (1 - a^(k+1)) / (1 - a) tokens a round (Leviathan et al. 2023, equation 1).
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from teal.bench.steps import machine_facts
from teal.calibration.texts import default_text, read_texts
from teal.cli import command_line as cli
from teal.cli.options import add_compile_argument, add_model_arguments, model_options
from teal.decoding.engine import Engine
from teal.decoding.speculation import SpeculativeEngine
from teal.errors import UserError
from teal.options import QUANTS, DraftOptions, SamplingParams, check_length


@torch.inference_mode()
def preference(engine: Engine, prompt: list[int], text: list[int], other: list[int]) -> float:
    """By how much the dense model's logits of two texts' tokens differ where they part, in steps of its dtype."""
    at = next(i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b)
    ids = torch.tensor([prompt + text[:at]], device=engine.device)
    positions = torch.arange(ids.shape[1], device=engine.device)[None]
    model = engine.model
    logits = model(ids, positions, model.new_cache(1, ids.shape[1]))[0, -1].float()
    here, there = float(logits[text[at]]), float(logits[other[at]])
    step = torch.finfo(engine.dtype).eps * 2.0 ** math.floor(math.log2(max(abs(here), abs(there))))
    return abs(here - there) / step


@dataclass(slots=True)
class Figures:
    """What the prompts gave for one draft and length; seconds and tokens of each prompt."""

    label: str
    length: int
    texts: list[list[int]] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    round_s: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0

    def row(self, dense: "Figures", engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
        """The figures beside those of the dense engine, which tells what the prompts' texts that differ mean."""
        ratios = [a / b for a, b in zip(self.tokens_per_s, dense.tokens_per_s, strict=True)]
        other = [(p, a, b) for p, a, b in zip(prompts, dense.texts, self.texts, strict=True) if a != b]
        return {
            "draft": self.label,
            "length": self.length,
            "accepted": self.accepted / max(1, self.drafted),
            "tokens_a_round": sum(len(t) - 1 for t in self.texts) / self.rounds,
            "round_ms": 1e3 * statistics.median(self.round_s),
            "tokens_per_s": statistics.median(self.tokens_per_s),
            "ratio": statistics.median(ratios),
            "same_texts": len(self.texts) - len(other),
            "texts": len(self.texts),
            "preferences": sorted(preference(engine, *texts) for texts in other),
        }


def build_parser() -> cli.Parser:
    """The command line of bench.speculate."""
    parser = cli.Parser("Measure speculative decoding: acceptance, speed and whether the texts are the dense model's.")
    add_model_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--drafts",
        default="0.5",
        help="sparsities, int8:S, int4:S or FOLDER:S (of quantize.py), or lookup; commas between",
    )
    group.add_argument("--lengths", type=cli.positive_ints, default=(1, 2, 4), help="tokens drafted a round")
    group.add_argument(
        "--text", type=Path, help="UTF-8 file the prompts are cut from; without it a text that comes along"
    )
    group.add_argument("--prompts", type=cli.positive_int, default=5, help="how many, evenly spread over the text")
    group.add_argument("--context", type=cli.positive_int, default=64, help="tokens of a prompt")
    group.add_argument("--tokens", type=cli.positive_int, default=64, help="tokens generated after each")
    group.add_argument("--acceptances", type=cli.sparsities, default=(), help="also the speed at these, commas between")
    add_compile_argument(group)
    return parser


def parse_draft(text: str) -> DraftOptions:
    """The draft that "0.5", "int4:0.5", "FOLDER:0.5" or "lookup" means, of one token. Raises UserError."""
    if text == "lookup":
        return DraftOptions(length=1, lookup=True)
    rounded, _, sparsity = text.rpartition(":")
    quant = rounded if rounded in QUANTS else None
    try:
        return DraftOptions(
            length=1, sparsity=float(sparsity), quant=quant, checkpoint=None if quant else rounded or None
        )
    except ValueError:
        expected = "a sparsity (0.5), one of rounded weights (int4:0.5, FOLDER:0.5), or lookup"
        raise UserError(f"--drafts {text}: expected {expected}") from None


def prompts_of(args: argparse.Namespace, engine: Engine) -> list[list[int]]:
    """Token lists from all over the text; arbitrary ones for random weights. Raises UserError if it is too short."""
    if args.random_weights is not None:
        return [[1000 + (7 * i + j) % 1000 for j in range(args.context)] for i in range(args.prompts)]
    ids = engine.tokenizer.encode(read_texts([args.text], "text") if args.text is not None else default_text())
    spacing = len(ids) // args.prompts
    if spacing < args.context:
        raise UserError(f"the text has {len(ids)} tokens; {args.prompts} prompts of {args.context} need more")
    return [ids[i * spacing : i * spacing + args.context] for i in range(args.prompts)]


def run(engine: Engine, prompt: list[int], tokens: int, figures: Figures) -> None:
    """Generate after prompt from an empty cache and note what it took."""
    engine.cached_ids = []
    figures.texts.append(list(engine.generate(prompt, SamplingParams(), tokens + 1, ignore_eos=True)))
    stats = engine.stats
    assert stats.tokens_per_s is not None
    rounds = stats.rounds or tokens
    figures.tokens_per_s.append(stats.tokens_per_s)
    figures.round_s.append(sum(stats.token_s) / rounds)
    figures.drafted += stats.drafted_tokens
    figures.accepted += stats.accepted_tokens
    figures.rounds += rounds


def measure(args: argparse.Namespace, report: Callable[[dict[str, Any]], None]) -> tuple[Engine, list[dict[str, Any]]]:
    """The dense engine and a row for each draft and length, reported as they come."""
    options = model_options(args)
    drafts = {text: parse_draft(text) for text in args.drafts.split(",")}
    for length in args.lengths:
        check_length(length)
    dense = SpeculativeEngine.load(options)
    prompts = prompts_of(args, dense)
    rows = []
    for text, draft in drafts.items():
        engine = dense if draft.lookup else SpeculativeEngine.load_with_draft(options, draft)
        for length in args.lengths:
            plain, drafted = Figures("dense", 0), Figures(text, length)
            set_length(engine, length)
            run(engine, prompts[0], args.tokens, Figures(text, length))  # compiles and captures
            for prompt in prompts:
                dense.drafter = None  # a lookup drafts with the dense engine itself
                run(dense, prompt, args.tokens, plain)
                set_length(engine, length)
                run(engine, prompt, args.tokens, drafted)
            row = drafted.row(plain, dense, prompts) | {"dense_tokens_per_s": statistics.median(plain.tokens_per_s)}
            row["dtype"] = str(dense.dtype).removeprefix("torch.")
            rows.append(row)
            report(row)
        dense.drafter = None
        del engine
    return dense, rows


def set_length(engine: SpeculativeEngine, length: int) -> None:
    """Draft length tokens in every round."""
    if engine.drafter is None or engine.drafter.looks_up:
        engine.look_up(length)
    assert engine.drafter is not None
    engine.drafter.length, engine.drafter.adapts = length, False


def speed_at(row: dict[str, Any], acceptance: float) -> float:
    """Tokens/s of a row's rounds if each drafted token were taken with this probability."""
    return 1e3 * sum(acceptance**i for i in range(row["length"] + 1)) / row["round_ms"]


def print_row(row: dict[str, Any]) -> None:
    """A row as a line."""
    print(
        f"{row['draft']:>10} x{row['length']:<3}{row['accepted']:7.1%} accepted{row['tokens_a_round']:6.2f} tokens and"
        f"{row['round_ms']:8.2f} ms a round{row['tokens_per_s']:8.1f} tok/s{row['ratio']:6.2f}x dense"
        f" ({row['dense_tokens_per_s']:.1f})   {row['same_texts']} of {row['texts']} texts the same",
        flush=True,
    )
    if row["preferences"]:
        steps = ", ".join(f"{steps:.1f}" for steps in row["preferences"])
        print(f"{'':10} where the others part, their tokens are so many steps of {row['dtype']} apart: {steps}")


def print_curve(rows: list[dict[str, Any]], acceptances: tuple[float, ...]) -> None:
    """The best length and its speed over dense, for each draft and acceptance."""
    for draft in dict.fromkeys(row["draft"] for row in rows):
        of_draft = [row for row in rows if row["draft"] == draft]
        for a in acceptances:
            best = max(of_draft, key=lambda row: speed_at(row, a))
            speed = speed_at(best, a)
            print(
                f"{draft:>10} at {a:.0%} taken: {speed:7.1f} tok/s, {speed / best['dense_tokens_per_s']:.2f}x dense,"
                f" by drafting {best['length']}"
            )


def main() -> None:
    """Measure and print; the last line is JSON."""
    args = build_parser().parse_args()
    dense, rows = measure(args, print_row)
    print_curve(rows, args.acceptances)
    print(json.dumps(machine_facts(dense.device) | {"rows": rows}))


if __name__ == "__main__":
    cli.run(main)
