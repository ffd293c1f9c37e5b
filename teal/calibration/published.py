"""TEAL's published calibration -> a plan: `models/<Model>/histograms` and greedy lookup tables of its repository.

Layout: histograms/layer-N/{self_attn,mlp}/histograms.pt hold counts and bin centers of the signed inputs h1 (after the
norm) and h2 (of o, of down). lookup/layer-N/results.csv lists the greedy method's path, one row a step, with the
block's sparsity and that of each projection. The pickles are read with weights_only, which refuses anything but
tensors.
"""

import csv
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from teal.checkpoint.config import SIZELESS
from teal.errors import ParameterError, UserError
from teal.plan import ProjectionPlan, SparsityPlan

# Projection -> (folder of its histograms, name of its input there). Folders are called as Hugging Face's modules are.
SOURCES = {
    name: (hf_name.partition(".")[0], "h1" if p.input == "normed" else "h2")
    for p in SIZELESS.projections()
    for name, hf_name in zip(p.names, p.hf_names, strict=True)
}


def import_teal(folder: Path, target: float, method: str) -> SparsityPlan:
    """The plan for one sparsity from a model folder of TEAL's repository, uniform or by its greedy lookup.

    Raises UserError if files are missing, hold anything but tensors, or do not reach the target.
    """
    if method == "global":
        raise ParameterError("{method} global needs the model's gradients; published plans are uniform or greedy")
    layers = _layer_folders(folder / "histograms")
    plans = []
    for i, path in enumerate(layers):
        sparsities = dict.fromkeys(SOURCES, target) if method == "uniform" else _lookup(folder, i, target)
        cuts = {name: _threshold(*_histogram(path, *SOURCES[name]), p) for name, p in sparsities.items()}
        plans.append({name: ProjectionPlan(round(p, 6), cuts[name]) for name, p in sparsities.items()})
    facts = {"imported": "TEAL", "model": folder.name}
    return SparsityPlan({"num_layers": len(plans)}, method, target, tuple(plans), calibration=facts)


def _layer_folders(folder: Path) -> list[Path]:
    numbers = {int(m[1]): p for p in folder.glob("layer-*") if (m := re.fullmatch(r"layer-(\d+)", p.name))}
    if not numbers or sorted(numbers) != list(range(len(numbers))):
        raise UserError(f"{folder}: holds layers {sorted(numbers)}; expected layer-0, layer-1, ... without a gap")
    return [numbers[i] for i in range(len(numbers))]


def _histogram(path: Path, part: str, name: str) -> tuple[Tensor, Tensor]:
    file = path / part / "histograms.pt"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on the pickle it then refuses
            content = torch.load(file, map_location="cpu", weights_only=True)
        counts, centers = content[name].double(), content[f"{name}_centers"].double()
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except Exception as error:  # a pickle can fail in any way; whatever it was, nothing of it ran
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{file}: no histogram of tensors named {name} and {name}_centers ({reason[:120]})") from None
    if counts.shape != centers.shape or counts.dim() != 1 or not counts.sum() > 0 or not centers.isfinite().all():
        raise UserError(f"{file}: counts {tuple(counts.shape)} and centers {tuple(centers.shape)} do not match")
    return counts, centers


def _threshold(counts: Tensor, centers: Tensor, p: float) -> float:
    """The magnitude below which a share p of the counted entries lies, interpolated between bins."""
    if p == 0:
        return 0.0
    order = centers.abs().argsort()
    magnitudes, cumulative = centers.abs()[order], counts[order].cumsum(0) / counts.sum()
    i = int(torch.searchsorted(cumulative, p))
    if i == 0:
        return float(magnitudes[0] * p / cumulative[0])
    share = (p - cumulative[i - 1]) / (cumulative[i] - cumulative[i - 1])
    return float(magnitudes[i - 1] + share * (magnitudes[i] - magnitudes[i - 1]))


def _lookup(folder: Path, layer: int, target: float) -> dict[str, float]:
    path = folder / "lookup" / f"layer-{layer}" / "results.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        for row in rows:
            if row["Effective Sparsity"] >= target - 1e-6:
                return {name: row[name] for name in SOURCES}
    except FileNotFoundError:
        raise ParameterError("{}: missing; use {method} uniform, which needs histograms only", path) from None
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: not a greedy lookup table ({error!r})") from None
    raise UserError(f"{path}: ends before sparsity {target}; give a smaller one")
