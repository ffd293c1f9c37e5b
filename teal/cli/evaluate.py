"""Measure what sparsity costs in quality: python evaluate.py --text book.txt --sparsity 0,0.4,0.5 --method uniform"""

import argparse
import csv
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.cli import command_line as cli
from teal.cli.options import (
    add_force_plan_argument,
    add_kv_cache_argument,
    add_model_arguments,
    add_tensor_parallel_argument,
    add_text_arguments,
    model_options,
)
from teal.cli.ranks import is_first, start_ranks
from teal.errors import UserError
from teal.files import FileKind, Output, atomic_file, reserved
from teal.options import CALIBRATION_LENGTH, CALIBRATION_SEQUENCES, METHODS, POLICY_SHARES, ModelOptions, Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from teal.checkpoint.loading import Described, LoadedModel
    from teal.evaluation.quality import Case, Result
    from teal.model import Transformer
    from teal.plan import SparsityPlan

CSV = FileKind("a table of evaluate.py", rb"^method,sparsity,policy,")


def build_parser() -> cli.Parser:
    """The command line of evaluate.py."""
    parser = cli.Parser("Measure perplexity, divergence from the dense model and greedy agreement, by sparsity.")
    add_tensor_parallel_argument(add_model_arguments(parser))
    grid = parser.add_argument_group("what to evaluate (the dense model always comes first)")
    add_kv_cache_argument(grid)
    grid.add_argument(
        "--sparsity", type=cli.sparsities, default=Settings().targets,
        help="sparsities, commas between; by the plans of generate.py: those beside the checkpoint, or quick ones",
    )  # fmt: skip
    grid.add_argument(
        "--policy", type=_choices(tuple(POLICY_SHARES)), default=tuple(POLICY_SHARES)[:1],
        help="tokens that are sparse: decode: all, as generated ones are; half: the last half of each window (paper)",
    )  # fmt: skip
    grid.add_argument(
        "--plan", type=Path, action="append", default=[], help="plan file to evaluate instead; may be repeated"
    )
    add_force_plan_argument(grid)
    text = parser.add_argument_group("text")
    add_text_arguments(text)
    text.add_argument("--tokens", type=cli.positive_int, default=16384, help="most tokens to score")
    text.add_argument("--window", type=cli.positive_int, default=2048, help="tokens a window, capped to the context")
    text.add_argument("--stride", type=cli.positive_int, default=1024, help="tokens from one window to the next")
    add_calibration_arguments(parser)
    add_measurement_arguments(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    out.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    out.add_argument("--plot", type=Path, metavar="FILE", help="also draw perplexity by sparsity as PNG")
    return parser


def add_calibration_arguments(parser: cli.Parser) -> None:
    """Options that have plans calibrated: none has a default, for any that is given asks for it."""
    group = parser.add_argument_group(
        "calibration (any of these makes plans for --sparsity anew, and keeps them in the cache)"
    )
    group.add_argument(
        "--method", type=_choices(METHODS),
        help=f"of {', '.join(METHODS)}, commas between; {Settings().method} unless given",
    )  # fmt: skip
    group.add_argument(
        "--calibration-text", type=Path, action="append", default=[],
        help="file; may be repeated; else as calibrate.py's",
    )  # fmt: skip
    group.add_argument(
        "--sequences", type=cli.positive_int, help=f"token sequences; {CALIBRATION_SEQUENCES} unless given"
    )
    group.add_argument("--length", type=cli.positive_int, help=f"tokens each; {CALIBRATION_LENGTH} unless given")


def add_measurement_arguments(parser: cli.Parser) -> None:
    """Options that ask for more than one pass over the text."""
    more = parser.add_argument_group("more measurements")
    more.add_argument(
        "--reference", metavar="CHECKPOINT",
        help="model to measure divergence and agreement from, for a quantized one; without it the model itself, dense",
    )  # fmt: skip
    more.add_argument("--continuations", type=cli.count, default=0, help="prompts to continue greedily; 0 is off")
    more.add_argument(
        "--decode-tokens", type=cli.count, default=0, help="score so many tokens one by one, too; 0 is off"
    )
    more.add_argument(
        "--choices", type=cli.count, default=0, help="items of a multiple-choice task made from the text; 0 is off"
    )
    more.add_argument(
        "--lm-eval", metavar="TASKS", help="also run these tasks of lm-evaluation-harness, commas between"
    )
    more.add_argument("--lm-eval-path", type=Path, metavar="FOLDER", help="folder with further task definitions")
    more.add_argument("--lm-eval-limit", type=cli.positive_int, help="examples a task; without it all")


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
    check_arguments(args)
    start_ranks(args.tensor_parallel, args.device)
    if not is_first(args.tensor_parallel):  # which computes as the first does, and says nothing
        args.csv = args.plot = None
    with reserved(*outputs(args)):
        evaluate_model(args)


def outputs(args: argparse.Namespace) -> list[Output]:
    """The files that args name to be written."""
    found = [Output("--csv", args.csv, CSV)] if args.csv is not None else []
    if args.plot is not None:
        from teal.evaluation.plots import FIGURE

        found.append(Output("--plot", args.plot, FIGURE))
    return found


def evaluate_model(args: argparse.Namespace) -> None:
    """Load, calibrate where needed, evaluate; print the rows and write them."""
    from teal.calibration.texts import first_tokens, read_texts
    from teal.checkpoint.loading import load_for_decoding
    from teal.evaluation.quality import evaluate
    from teal.layers.block_linear import floats_kept

    text = read_texts(args.text, args.field)
    calibration_text = read_texts(args.calibration_text, args.field) if calibrates(args) else ""
    options = model_options(args, sparsity=0.0, plan=None)
    check = functools.partial(check_model, args, text, calibration_text)
    loaded = load_for_decoding(options, check, sparse=True)
    if loaded.team is not None:
        loaded.team.in_step = True
    tokens = first_tokens(loaded.encode, text, args.tokens)
    reference = load_reference(args)
    with floats_kept(loaded.model):
        cases = build_cases(args, loaded, calibration_text)
    window = min(args.window, loaded.model.config.max_seq_len)
    results = evaluate(loaded.model, tokens, cases, window, min(args.stride, window - 1), reference)
    if args.csv is not None:
        write_csv([result.as_row() for result in results], args.csv)  # of hours, before more of them
    warn_of_misses(results)
    more = more_measurements(args, loaded, cases, tokens, reference)
    rows = [result.as_row() | further for result, further in zip(results, more, strict=True)]
    if args.json:
        print(json.dumps({"model": loaded.name, "tokens": len(tokens), "window": window, "rows": rows}))
    else:
        print_table(rows)
    if args.csv is not None:
        write_csv(rows, args.csv)
    if args.plot is not None:
        from teal.evaluation.plots import plot_quality

        plot_quality(rows, args.plot)


def calibrates(args: argparse.Namespace) -> bool:
    """Whether plans are to be calibrated: an option of that group was given."""
    options = (args.method, args.calibration_text or None, args.sequences, args.length)
    return not args.plan and any(option is not None for option in options)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for what is wrong whatever the model."""
    if args.stride >= args.window:
        raise UserError(
            f"--stride {args.stride} must be less than --window {args.window}: "
            "the first token of a window has nothing before it that could predict it"
        )
    for option, path in (("--csv", args.csv), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{option} {path}: no such folder; create it first")
    if args.lm_eval_path is not None and not args.lm_eval_path.is_dir():
        raise UserError(f"--lm-eval-path {args.lm_eval_path}: no such folder")
    cli.require_package("matplotlib", "--plot", args.plot)
    cli.require_package("lm_eval", "--lm-eval", args.lm_eval)


def check_model(args: argparse.Namespace, text: str, calibration_text: str, model: "Described") -> None:
    """Raise UserError if this model cannot be evaluated as asked. Its weights have not been read yet."""
    from teal.calibration.texts import first_tokens
    from teal.checkpoint.loading import describe
    from teal.evaluation.choices import check_items
    from teal.evaluation.quality import check_tokens
    from teal.plan import load_fitting_plan, plan_file

    count = len(first_tokens(model.encode, text, args.tokens))
    check_tokens(count, args.continuations)
    check_items(count, args.choices)
    if args.reference is not None:
        expected, found = model.config.vocab_size, describe(args.reference).config.vocab_size
        if found != expected:
            raise UserError(
                f"--reference {args.reference} has {found} tokens in its vocabulary, {model.name} {expected}"
            )
    for path in args.plan:
        load_fitting_plan(path, model.config, args.force_plan)
    if calibrates(args):
        calibration_sequences(args, model.encode, calibration_text, model.config.max_seq_len, model.is_rotated)
    elif not args.plan:
        for target in args.sparsity:
            if (beside := plan_file(model.folder, target, None)) is not None:
                load_fitting_plan(beside, model.config, args.force_plan)


def calibration_sequences(
    args: argparse.Namespace, encode: "Callable[[str], list[int]]", text: str, limit: int, rotated: bool
) -> "Tensor":
    """Token ids [sequences, length] to calibrate on, from the calibration part of a text. Raises UserError.

    rotated: as for split_text.
    """
    from teal.calibration.texts import CALIBRATION_PART, split_text, token_sequences

    length = min(args.length or CALIBRATION_LENGTH, limit)
    part = split_text(text, rotated)[0]
    return token_sequences(encode, part, args.sequences or CALIBRATION_SEQUENCES, length, (CALIBRATION_PART, len(text)))


def load_reference(args: argparse.Namespace) -> "Transformer | None":
    """The model of --reference."""
    from teal.checkpoint.loading import load_for_decoding

    if args.reference is None:
        return None
    return load_for_decoding(ModelOptions(args.reference, device=args.device, dtype=args.dtype), sparse=True).model


def build_cases(args: argparse.Namespace, loaded: "LoadedModel", calibration_text: str) -> "list[Case]":
    """The dense model, then each plan under each policy; the model is sparse afterwards if there is any plan."""
    from teal.checkpoint.loading import load_plan
    from teal.evaluation.quality import Case
    from teal.plan import SparsityPlan

    targets = tuple(target for target in args.sparsity if target > 0)
    plans: list[tuple[str, SparsityPlan]] = []
    if args.plan:
        plans = [(path.stem, load_plan(path, loaded)) for path in args.plan]
    elif targets and calibrates(args):
        for method in args.method or (Settings().method,):
            plans += [(method, plan) for plan in calibrated_plans(args, loaded, calibration_text, method, targets)]
    else:
        plans = [(plan.method, plan) for plan in chosen_plans(loaded, targets)]
    cases = [Case("dense", 0.0, None)]
    return cases + [Case(name, plan.target, plan, policy) for policy in args.policy for name, plan in plans]


def chosen_plans(loaded: "LoadedModel", targets: tuple[float, ...]) -> "list[SparsityPlan]":
    """The plans that generate.py takes for the targets."""
    from teal.calibration.choose import choose_plan
    from teal.plan import plan_file

    plans = []
    for target in targets:
        plans.append(choose_plan(loaded, target, None))
        path = plan_file(loaded.folder, target, None)
        source = (
            f"plan {path}"
            if path is not None
            else f"quick plan, {plans[-1].method}, calibrated on Python's help topics"
        )
        print(f"sparsity {target:g}: {source}", file=sys.stderr)
    return plans


def calibrated_plans(
    args: argparse.Namespace, loaded: "LoadedModel", text: str, method: str, targets: tuple[float, ...]
) -> "list[SparsityPlan]":
    """Plans for the targets by one of METHODS, from the cache or calibrated now."""
    from teal.calibration.texts import text_hash
    from teal.calibration.thresholds import calibrate
    from teal.plan import SparsityPlan, cached_plan

    limit = loaded.model.config.max_seq_len
    sequences = calibration_sequences(args, loaded.encode, text, limit, loaded.is_rotated)
    count, length = sequences.shape
    facts = {"text": text_hash(text), "sequences": count, "length": length}
    how = f"{facts['text']}-{count}x{length}-{method}"
    paths = {t: cached_plan(loaded.identity, how, loaded.model.dtype, loaded.model.device, t) for t in targets}
    wanted = tuple(t for t, path in paths.items() if not path.exists())
    if wanted:
        settings = Settings(wanted, method)
        print(f"calibrating {method} at {', '.join(f'{t:g}' for t in wanted)}", file=sys.stderr)
        for plan in calibrate(loaded.model, sequences, settings, facts, weights=loaded.weights):
            plan.save(paths[plan.target])
    for target, path in paths.items():
        print(f"sparsity {target:g}: {method} plan on {count} x {length} tokens, {path}", file=sys.stderr)
    return [SparsityPlan.load(path) for path in paths.values()]


def warn_of_misses(results: "list[Result]") -> None:
    """Say which plans reach another sparsity on this text than their target."""
    found = (r.case.plan.warning(r.achieved, r.score.tokens, "this text") for r in results if r.case.plan is not None)
    for line in dict.fromkeys(filter(None, found)):
        print(line, file=sys.stderr)


def more_measurements(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    cases: "list[Case]",
    tokens: "Tensor",
    reference: "Transformer | None",
) -> list[dict[str, Any]]:
    """For each case the measurements that options ask for; generated tokens are all sparse whatever the policy."""
    from teal.evaluation.choices import choice_scores
    from teal.evaluation.quality import agreements_with_dense, decode_score
    from teal.plan import keep_all_plan
    from teal.teal_layers import sparsify

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
    if args.choices > 0:
        for row, scores in zip(found, choice_scores(model, cases, tokens, args.choices, reference), strict=True):
            row |= scores
    if args.lm_eval:
        from teal.evaluation.harness import run_tasks

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
