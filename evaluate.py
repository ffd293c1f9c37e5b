"""Measure what sparsity costs in quality: python evaluate.py --text book.txt --sparsity 0,0.4,0.5 --method uniform"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli
from calibrate import DEFAULT_LENGTH, DEFAULT_SEQUENCES, add_text_arguments
from errors import UserError
from files import FileKind, Output, atomic_file, reserved

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation import Case
    from loading import LoadedModel
    from model import Transformer
    from plan import SparsityPlan

METHODS = ("uniform", "greedy", "wina-uniform", "wina-greedy")
POLICIES = ("decode", "half")
CSV = FileKind("a table of evaluate.py", rb"^method,sparsity,policy,")


def build_parser() -> cli.Parser:
    """The command line of evaluate.py."""
    parser = cli.Parser("Measure perplexity, divergence from the dense model and greedy agreement, by sparsity.")
    cli.add_model_arguments(parser)
    cli.add_kv_cache_argument(parser)
    grid = parser.add_argument_group("what to evaluate (the dense model always comes first)")
    grid.add_argument("--sparsity", type=cli.sparsities, default=(0.5,), help="sparsities, commas between")
    grid.add_argument("--method", type=_choices(METHODS), default=("uniform",), help=f"of {', '.join(METHODS)}")
    grid.add_argument(
        "--policy", type=_choices(POLICIES), default=("decode",),
        help="tokens that are sparse: decode: all, as generated ones are; half: the last half of each window (paper)",
    )  # fmt: skip
    grid.add_argument("--plan", type=Path, action="append", default=[], help="plan file to evaluate instead of a grid")
    cli.add_force_plan_argument(grid)
    text = parser.add_argument_group("text")
    add_text_arguments(text)
    text.add_argument("--tokens", type=cli.positive_int, default=16384, help="most tokens to score")
    text.add_argument("--window", type=cli.positive_int, default=2048, help="tokens a window, capped to the context")
    text.add_argument("--stride", type=cli.positive_int, default=1024, help="tokens from one window to the next")
    calibration = parser.add_argument_group("calibration (plans are kept in the cache)")
    calibration.add_argument(
        "--calibration-text", type=Path, action="append", default=[], help="default: as calibrate's"
    )
    calibration.add_argument("--sequences", type=cli.positive_int, default=DEFAULT_SEQUENCES, help="token sequences")
    calibration.add_argument("--length", type=cli.positive_int, default=DEFAULT_LENGTH, help="tokens each")
    more = parser.add_argument_group("more measurements")
    more.add_argument(
        "--reference", metavar="CHECKPOINT",
        help="model to measure divergence and agreement from, for a quantized one; default: the model itself, dense",
    )  # fmt: skip
    more.add_argument("--continuations", type=int, default=0, help="prompts to continue greedily; 0 is off")
    more.add_argument("--decode-tokens", type=int, default=0, help="score so many tokens one by one, too; 0 is off")
    more.add_argument(
        "--lm-eval", metavar="TASKS", help="also run these tasks of lm-evaluation-harness, commas between"
    )
    more.add_argument("--lm-eval-path", type=Path, metavar="FOLDER", help="folder with further task definitions")
    more.add_argument("--lm-eval-limit", type=cli.positive_int, help="examples a task; default all")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    out.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    out.add_argument("--plot", type=Path, metavar="FILE", help="also draw perplexity by sparsity as PNG")
    return parser


def _choices(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        for part in text.split(","):
            if part not in known:
                raise argparse.ArgumentTypeError(f"{part!r} is unknown; expected {', '.join(known)}")
        return tuple(text.split(","))

    return parse


def main() -> None:
    """Refuse what cannot be done, then evaluate."""
    args = build_parser().parse_args()
    if args.stride >= args.window:
        raise UserError(
            f"--stride {args.stride} must be less than --window {args.window}: "
            "the first token of a window has nothing before it that could predict it"
        )
    for path in (args.csv, args.plot):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: no such folder; create it first")
    with reserved(*outputs(args)):
        evaluate_model(args)


def outputs(args: argparse.Namespace) -> list[Output]:
    """The files that args name to be written. Raises UserError if matplotlib is wanted and missing."""
    found = [Output("--csv", args.csv, CSV)] if args.csv is not None else []
    if args.plot is not None:
        from plots import FIGURE, require_matplotlib

        require_matplotlib("--plot")
        found.append(Output("--plot", args.plot, FIGURE))
    return found


def evaluate_model(args: argparse.Namespace) -> None:
    """Load, calibrate where needed, evaluate; print the rows and write them."""
    from evaluation import evaluate
    from loading import load_for_decoding
    from texts import first_tokens, read_texts

    text = read_texts(args.text, args.field)
    loaded = load_for_decoding(
        args.checkpoint, args.random_weights, args.device, args.dtype, True,
        kv_cache=args.kv_cache, force_plan=args.force_plan,
    )  # fmt: skip
    tokens = first_tokens(loaded.tokenizer.encode, text, args.tokens)
    cases = build_cases(args, loaded)
    window = min(args.window, loaded.model.config.max_seq_len)
    reference = load_reference(args, loaded)
    results = evaluate(loaded.model, tokens, cases, window, min(args.stride, window - 1), reference)
    if args.csv is not None:
        write_csv([result.as_row() for result in results], args.csv)  # of hours, before more of them
    more = more_measurements(args, loaded, cases, tokens)
    rows = [result.as_row() | further for result, further in zip(results, more, strict=True)]
    if args.json:
        print(json.dumps({"model": loaded.name, "tokens": len(tokens), "window": window, "rows": rows}))
    else:
        print_table(rows)
    if args.csv is not None:
        write_csv(rows, args.csv)
    if args.plot is not None:
        from plots import plot_quality

        plot_quality(rows, args.plot)


def load_reference(args: argparse.Namespace, loaded: "LoadedModel") -> "Transformer | None":
    """The model of --reference. Raises UserError if its vocabulary is another one."""
    from loading import load_for_decoding

    if args.reference is None:
        return None
    model = load_for_decoding(args.reference, None, args.device, args.dtype, sparse=True).model
    expected, found = loaded.model.config.vocab_size, model.config.vocab_size
    if found != expected:
        raise UserError(f"--reference {args.reference} has {found} tokens in its vocabulary, {loaded.name} {expected}")
    return model


def build_cases(args: argparse.Namespace, loaded: "LoadedModel") -> "list[Case]":
    """The dense model, then each plan under each policy; the model is sparse afterwards if there is any plan."""
    from evaluation import Case
    from loading import load_plan

    plans: list[tuple[str, SparsityPlan]] = []
    for path in args.plan:
        plans.append((path.stem, load_plan(path, loaded)))
    targets = tuple(target for target in args.sparsity if target > 0)
    if not args.plan and targets:
        for method in args.method:
            plans += [(method, plan) for plan in calibrated_plans(args, loaded, method, targets)]
    cases = [Case("dense", 0.0, None)]
    return cases + [Case(name, plan.target, plan, policy) for policy in args.policy for name, plan in plans]


def calibrated_plans(
    args: argparse.Namespace, loaded: "LoadedModel", method: str, targets: tuple[float, ...]
) -> "list[SparsityPlan]":
    """Plans for the targets by one of METHODS, from the cache or calibrated now."""
    from calibration import Settings, calibrate
    from plan import SparsityPlan, cached_plan
    from texts import read_texts, split_text, text_hash, token_sequences

    text = read_texts(args.calibration_text, args.field)
    length = min(args.length, loaded.model.config.max_seq_len)
    facts = {"text": text_hash(text), "sequences": args.sequences, "length": length}
    how = f"{facts['text']}-{args.sequences}x{length}-{method}"
    weight = loaded.model.embedding.weight
    paths = {t: cached_plan(loaded.identity, how, weight.dtype, weight.device, t) for t in targets}
    wanted = tuple(t for t, path in paths.items() if not path.exists())
    if wanted:
        sequences = token_sequences(loaded.tokenizer.encode, split_text(text)[0], args.sequences, length)
        criterion = "wina" if method.startswith("wina") else "magnitude"
        settings = Settings(wanted, method.removeprefix("wina-"), criterion)
        print(f"calibrating {method} at {', '.join(f'{t:g}' for t in wanted)}", file=sys.stderr)
        for plan in calibrate(loaded.model, sequences, settings, facts, weights=loaded.weights):
            plan.save(paths[plan.target])
    return [SparsityPlan.load(path) for path in paths.values()]


def more_measurements(
    args: argparse.Namespace, loaded: "LoadedModel", cases: "list[Case]", tokens: "Tensor"
) -> list[dict[str, Any]]:
    """For each case the measurements that options ask for; generated tokens are all sparse whatever the policy."""
    from evaluation import POLICY_SHARES, agreements_with_dense, decode_score
    from plan import keep_all_plan
    from teal_layers import sparsify

    model = loaded.model
    plans = [case.plan or keep_all_plan(model.config) for case in cases]
    found: list[dict[str, Any]] = [{} for _ in cases]
    if args.continuations > 0:
        for row, length in zip(found, agreements_with_dense(model, plans, tokens, args.continuations), strict=True):
            row["tokens_until_difference"] = length
    if args.decode_tokens > 1:
        for row, plan in zip(found, plans, strict=True):
            sparsify(model, plan)
            row["decode_perplexity"] = decode_score(model, tokens[: args.decode_tokens]).perplexity
    if args.lm_eval:
        from harness import run_tasks

        names = args.lm_eval.split(",")
        for row, case, plan in zip(found, cases, plans, strict=True):
            sparsify(model, plan)
            share = POLICY_SHARES[case.policy]
            row |= run_tasks(model, loaded.tokenizer, names, share, args.lm_eval_limit, args.lm_eval_path)
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows as aligned text; a dash where a row lacks a figure."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for row in [names, *cells]:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Rows as a CSV file, atomically."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    cli.run(main)
