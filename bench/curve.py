"""Divergence over bytes read per token, a line for each method: python -m bench.curve int8.json int4.json -o curve.png

Each file is what `evaluate.py --json` printed for one checkpoint. A line is named after its file and the method of its
plans. It begins at the file's dense row, unless that does not diverge from the reference: a log axis has no zero.
"""

import json
from pathlib import Path
from typing import Any

from teal.cli import command_line as cli
from teal.errors import UserError
from teal.evaluation.plots import FIGURE, Lines, plot_curve, require_matplotlib
from teal.files import Output, reserved
from teal.user_text import parse_json

FIELDS = ("method", "policy", "kl", "bytes_per_token")  # of a row, that a curve needs


def build_parser() -> cli.Parser:
    """The command line of bench.curve."""
    parser = cli.Parser("Draw KL divergence over the weight bytes that a decoded token reads.")
    group = parser.add_argument_group("what to draw, and where to")
    group.add_argument("files", type=Path, nargs="+", metavar="FILE", help="output of evaluate.py --json")
    group.add_argument("-o", "--output", type=Path, default=Path("curve.png"), help="PNG to write")
    return parser


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows in a file of `evaluate.py --json`. Raises UserError, naming it, for any other file."""
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))["rows"]
        complete = all(name in row for row in rows for name in FIELDS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}); expected the output of evaluate.py --json") from error
    if not complete:
        raise UserError(f"{path}: its rows lack one of {', '.join(FIELDS)}; run evaluate.py --json again")
    return rows


def lines(files: dict[str, list[dict[str, Any]]]) -> Lines:
    """(bytes, KL) by label, for rows by the name of their file; rows without divergence have no point."""
    found: Lines = {}
    for name, rows in files.items():
        dense = [row for row in rows if row["method"] == "dense"]
        sparse = [row for row in rows if row["method"] != "dense"]
        labels = dict.fromkeys((row["method"], row["policy"]) for row in sparse or dense)
        for method, policy in labels:
            label = f"{name}, {method}" if policy == "decode" else f"{name}, {method}, {policy}"
            own = dense + [row for row in sparse if (row["method"], row["policy"]) == (method, policy)]
            found[label] = sorted((row["bytes_per_token"], row["kl"]) for row in own if row["kl"] > 0)
    return {label: points for label, points in found.items() if points}


def main() -> None:
    """Read the files and draw; the last line is JSON."""
    args = build_parser().parse_args()
    require_matplotlib("bench.curve")
    if not args.output.parent.is_dir():
        raise UserError(f"-o {args.output}: no such folder; create it first")
    found = lines({path.stem: read_rows(path) for path in args.files})
    if not found:
        raise UserError("no row diverges from its reference; run evaluate.py with --sparsity or --reference")
    with reserved(Output("-o", args.output, FIGURE)):
        plot_curve(found, args.output)
    print(json.dumps({"figure": str(args.output), "lines": found}))


if __name__ == "__main__":
    cli.run(main)
