"""One page about this machine and a model: python -m bench.report --checkpoint DIR -o report.html

Read bandwidth, the sparse product of each projection beside torch's own, and decode speed by sparsity. The page is one
HTML file that needs no other; a JSON file beside it has the same figures.
"""

import argparse
import io
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import torch

from teal.bench import decode, gemv
from teal.cli import command_line as cli
from teal.cli.options import add_decode_arguments
from teal.errors import UserError
from teal.evaluation.plots import require_matplotlib
from teal.files import FileKind, Output, atomic_file, cpu_name, reserved
from teal.hardware import DTYPES, pick_device

PAGE_KIND = FileKind("a page of bench.report", rb"<h2>Decoding, one token at a time</h2>")
FIGURES_KIND = FileKind("a file of bench.report", rb'"read_gb_per_s": ')
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>{{ r.model }} on {{ r.hardware }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color-scheme: light dark; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; background: #fff; } figure svg { width: 100%; height: auto; }
</style></head><body>
<h1>{{ r.model }} on {{ r.hardware }}</h1>
<p>{{ r.date }} · torch {{ r.torch }} · Python {{ r.python }} · {{ r.system }} ·
read bandwidth {{ "%.1f" | format(r.read_gb_per_s) }} GB/s</p>
<h2>Decoding, one token at a time</h2>
<table><tr><th></th><th>tok/s</th><th>ratio</th><th>first token</th><th>GB/s</th><th>share of bandwidth</th></tr>
{% for row in r.decode %}<tr><td>{{ row.label }}</td><td>{{ "%.1f" | format(row.tokens_per_s) }}</td>
<td>{{ "%.2f" | format(row.tokens_per_s / r.decode[0].tokens_per_s) }}</td>
<td>{{ "%.0f" | format(1000 * row.first_token_s) }} ms</td>
<td>{{ "%.1f" | format(row.gb_per_s) }}</td><td>{{ "%.0f" | format(100 * row.gb_per_s / r.read_gb_per_s) }}%</td></tr>
{% endfor %}</table>
<figure>{{ plots.decode | safe }}</figure>
<h2>One projection at a time</h2>
<table><tr><th></th><th>sparsity</th><th>sparse</th><th>dense by torch</th><th>ratio</th><th>GB/s</th></tr>
{% for row in r.gemv %}<tr><td>{{ row.projection }} {{ row.K }} × {{ row.N }}</td>
<td>{{ "%.0f" | format(100 * row.sparsity) }}%</td>
<td>{{ "%.1f" | format(row.us) }} µs</td><td>{{ "%.1f" | format(row.dense_us) }} µs</td>
<td>{{ "%.2f" | format(row.ratio) }}</td>
<td>{{ "%.0f" | format(row.gb_per_s) }}</td></tr>
{% endfor %}</table>
<figure>{{ plots.gemv | safe }}</figure>
<p>Command: <code>{{ r.command }}</code></p>
</body></html>
"""


def build_parser() -> cli.Parser:
    """The command line of bench.report."""
    parser = cli.Parser("Measure this machine with a model and write a page about it.")
    add_decode_arguments(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--sparsities", type=cli.sparsities, default=(0.0, 0.25, 0.4, 0.5), help="commas between")
    group.add_argument("--context", type=cli.positive_int, default=256, help="prompt tokens before the timed ones")
    group.add_argument("--tokens", type=cli.positive_int, default=64, help="timed tokens a round")
    group.add_argument("--rounds", type=cli.positive_int, default=5, help="rounds; the median is reported")
    group.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="page to write; .json beside it")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    defaults = vars(decode.build_parser().parse_args([]))
    decoded, config = decode.measure(argparse.Namespace(**{**defaults, **vars(args)}))
    device, ceiling = pick_device(args.device), 1e9 * decoded["read_gb_per_s"]
    dtype = next(name for name, known in DTYPES.items() if str(known) == f"torch.{decoded['rows'][0]['dtype']}")
    asked = gemv.build_parser().parse_args([])
    asked.dtypes, asked.sparsities, asked.quant = dtype, args.sparsities, args.quant
    name = args.checkpoint or args.random_weights or "SmolLM2-135M-Instruct"
    rows = gemv.measure(asked, {name: gemv.projection_shapes(config)}, device, ceiling)
    return {
        "model": name,
        "hardware": decoded["device"] if device.type == "cuda" else cpu_name(),
        "read_gb_per_s": decoded["read_gb_per_s"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": date.today().isoformat(),
        "command": "python -m bench.report " + " ".join(sys.argv[1:]),
        "decode": decoded["rows"],
        "gemv": rows,
    }


def plots(report: dict[str, Any]) -> dict[str, str]:
    """SVG figures: speed by sparsity, and each projection's ratio to dense."""
    return {
        "decode": _svg({"decoding": [(row["sparsity"], row["tokens_per_s"]) for row in report["decode"]]}, "tokens/s"),
        "gemv": _svg(
            {
                name: [(row["sparsity"], row["ratio"]) for row in report["gemv"] if row["projection"] == name]
                for name in dict.fromkeys(row["projection"] for row in report["gemv"])
            },
            "times as fast as dense",
        ),
    }


def _svg(lines: dict[str, list[tuple[float, float]]], label: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xlabel("sparsity")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return out.getvalue().split("?>", 1)[-1].split(">", 1)[-1]  # without the XML and document type declarations


def main() -> None:
    """Measure and write both files; the last line is JSON."""
    args = build_parser().parse_args()
    if not args.output.parent.is_dir():
        raise UserError(f"-o {args.output}: no such folder; create it first")
    require_matplotlib("bench.report")
    figures = args.output.with_suffix(".json")
    with reserved(Output("-o", args.output, PAGE_KIND), Output("-o", figures, FIGURES_KIND)):
        write(measure(args), args.output, figures)
    print(json.dumps({"page": str(args.output), "figures": str(figures)}))


def write(report: dict[str, Any], page: Path, figures: Path) -> None:
    """Write the figures, then draw and write the page."""
    with atomic_file(figures) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = jinja2.Environment(autoescape=True).from_string(PAGE).render(r=report, plots=plots(report))
    with atomic_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
