"""PNG figures: inputs with their thresholds, energy by channel, values by layer, quality by sparsity and by bytes."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from teal.errors import UserError
from teal.files import FileKind, atomic_file
from teal.model import Projection
from teal.plan import Histogram, SparsityPlan, bin_edges

Lines = dict[str, list[tuple[float, float]]]  # points (x, y) by label
ByLayer = list[dict[str, float]]  # a value [layer][projection]
Channels = tuple[np.ndarray, np.ndarray]  # energy and kept share by channel, each in falling order
DRAWN_BINS = 80
# Figures of older releases have no mark of their own: 1080 x 600 pixels, by matplotlib.
FIGURE = FileKind(
    "a figure of this program", rb"(?s)Source\x00TEAL|IHDR\x00\x00\x04\x38\x00\x00\x02\x58.*Software\x00Matplotlib"
)
MAX_PANELS = 3  # layers drawn in the figure of input distributions: first, middle, last


def plot_sparsities(plan: SparsityPlan, path: Path) -> None:
    """Heat map of sparsity by layer and projection."""
    values = [{name: p.sparsity for name, p in layer.items()} for layer in plan.layers]
    plot_by_layer({f"{plan.method}, target {plan.target:g}": values}, "sparsity", path)


def plot_by_layer(maps: dict[str, ByLayer], label: str, path: Path, log: bool = False) -> None:
    """Heat maps by layer and projection, one below the other by title, with one scale of colours: 0 to 1, or log."""

    def draw(figure: Any) -> None:
        from matplotlib.colors import LogNorm, Normalize

        values = {title: [[layer[name] for layer in layers] for name in layers[0]] for title, layers in maps.items()}
        positive = [v for rows in values.values() for row in rows for v in row if v > 0]
        norm = LogNorm(min(positive, default=0.1), max(positive, default=1.0)) if log else Normalize(0, 1)
        grid = figure.subplots(len(maps), sharex=True, squeeze=False)[:, 0]
        for axes, (title, layers) in zip(grid, maps.items(), strict=True):
            image = axes.imshow(values[title], aspect="auto", norm=norm, cmap="viridis")
            axes.set_yticks(range(len(layers[0])), list(layers[0]))
            axes.set_title(title)
        grid[-1].set_xlabel("layer")
        figure.colorbar(image, ax=list(grid), label=label)

    _save(draw, path)


def plot_channels(lines: dict[tuple[str, str], Channels], sparsity: float, path: Path) -> None:
    """Energy by channel, its running sum and the kept share, by (kind of input, "plain" or "rotated")."""
    kinds = list(dict.fromkeys(kind for kind, _ in lines))

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 3)
        for (kind, weights), (energy, kept) in lines.items():
            style = {"color": f"C{kinds.index(kind)}", "linestyle": "-" if weights == "rotated" else ":"}
            share = np.arange(1, len(energy) + 1) / len(energy)
            for axes, values in zip(panels, (energy, energy.cumsum() / energy.sum(), kept), strict=True):
                axes.plot(share, values, label=f"{kind}, {weights}", **style)
        panels[0].set_yscale("log")
        titles = ("energy, mean of channels = 1", "share of energy so far", f"kept at {sparsity:.0%}")
        for axes, title in zip(panels, titles, strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("channels, largest first")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds))

    _save(draw, path)


def plot_inputs(
    histograms: list[dict[str, Histogram]], plan: SparsityPlan, projections: Sequence[Projection], path: Path
) -> None:  # fmt: skip
    """Distribution of |x| for each projection's input, with the threshold, in the first, middle and last layer."""
    chosen = sorted({0, len(histograms) // 2, len(histograms) - 1})[:MAX_PANELS]
    names = [p.names[0] for p in projections]  # what is stacked in a linear layer shares its input
    edges = bin_edges()

    def draw(figure: Any) -> None:
        grid = figure.subplots(len(chosen), len(names), squeeze=False)
        for row, i in zip(grid, chosen, strict=True):
            for axes, name in zip(row, names, strict=True):
                counts = histograms[i][name].counts.double()
                limit = max(histograms[i][name].quantile(0.995), 1e-9)
                # The histogram's bins are narrower the nearer to 0, and few entries fall into each of those.
                below = np.concatenate(([0.0], counts.cumsum(0) / counts.sum()))
                ends = np.linspace(0.0, limit, DRAWN_BINS + 1)
                axes.stairs(np.diff(np.interp(ends, edges, below)), ends, fill=True, alpha=0.6)
                axes.axvline(plan.layers[i][name].threshold, color="black", linewidth=1)
                axes.set_title(f"layer {i}, input of {name}", fontsize=8)
                axes.set_yticks([])
                axes.tick_params(labelsize=7)
                axes.set_xlim(0, limit)

    _save(draw, path)


def plot_quality(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity by sparsity, a line for each method and policy of evaluate.py's rows."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for label in dict.fromkeys((row["method"], row["policy"]) for row in rows if row["sparsity"]):
            points = sorted(
                (row["sparsity"], row["perplexity"])
                for row in rows
                if not row["sparsity"] or (row["method"], row["policy"]) == label
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=", ".join(label))
        axes.set_xlabel("sparsity")
        axes.set_ylabel("perplexity")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3)

    _save(draw, path)


def plot_curve(lines: Lines, path: Path) -> None:
    """KL divergence, on a log axis, over the weight bytes that a token reads: lines of (bytes, KL > 0)."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for label, points in lines.items():
            axes.plot([size / 1e6 for size, _ in points], [kl for _, kl in points], marker="o", label=label)
        axes.set_xlabel("MB of weights read per token")
        axes.set_ylabel("KL divergence (nats per token)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend()
        axes.grid(alpha=0.3, which="both")

    _save(draw, path)


def require_matplotlib(what: str) -> None:
    """Raise UserError, before the work whose result it would draw, if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError(f"{what} needs matplotlib; pip install matplotlib")


def _save(draw: Callable[[Any], None], path: Path) -> None:
    require_matplotlib("a figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL.Image import Dither, fromarray
    from PIL.PngImagePlugin import PngInfo

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure)
    canvas.draw()
    mark = PngInfo()
    mark.add_text("Source", "TEAL")
    # A palette makes files of smooth lines a third as large.
    image = fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(dither=Dither.NONE)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=mark)
