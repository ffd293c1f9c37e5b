"""What a rotation does to a model's channels: python -m bench.energy -o figures

The rotation is found on one part of the text, as by calibrate.py --rotate, and everything else is measured on another.
Three figures, each with the plain weights beside the rotated ones:

    channels.png     of the inputs behind norms and of o: energy E[x_i^2], its running sum, how often a channel is kept
    errors.png       nats a token that dropping entries of one projection costs, to second order
    sparsities.png   the share that --method global drops, for the least sum of those errors

No rotated model is made. A rotated projection reads z Q, with z = x / norm the input before the norm's weight, and its
gradient there is (norm v) Q. So the inputs x and gradients v of the plain model give both.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teal.calibration.allocation import allocate_by_layer
from teal.calibration.curves import GRID, error_curve
from teal.calibration.greedy import check_targets
from teal.calibration.rotation import find_rotation
from teal.calibration.sensitivity import BackwardPass, Samples, pieces_of
from teal.calibration.stages import weight_counts
from teal.calibration.texts import read_texts, rotation_text, split_text, spread_sequences, token_sequences
from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.rotation import Rotation
from teal.cli import command_line as cli
from teal.cli.calibrate import ROTATION_SHARE
from teal.cli.options import add_model_arguments, add_text_arguments, model_options
from teal.errors import UserError
from teal.evaluation.plots import FIGURE, ByLayer, plot_by_layer, plot_channels, require_matplotlib
from teal.files import Output, reserved
from teal.model import Block, Projection, RMSNorm, Transformer
from teal.options import CALIBRATION_LENGTH, CALIBRATION_SEQUENCES, Settings
from teal.progress import progress

FIGURES = ("channels.png", "errors.png", "sparsities.png")
OFTEN = 0.9  # a channel is nearly always kept if more than this share of the tokens keep it
WEIGHTS = ("plain", "rotated")


@dataclass(slots=True)
class Measured:
    """Of a model's plain or rotated weights.

    energy, kept: by kind of input ("normed", "attended"), an fp64 [K] for each projection module. E[x_i^2] beside the
    mean of all channels, and the share of tokens that keep a channel; each in falling order.
    curves: nats by sparsity of GRID, [layer][name].
    """

    energy: dict[str, list[Tensor]] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    curves: list[dict[str, list[float]]] = field(default_factory=list)

    def note(self, p: Projection, inputs: Tensor, sparsity: float) -> None:
        """Add energy and kept share of p's inputs [n, K]."""
        energy = inputs.double().square().mean(0)
        magnitudes = inputs.abs()
        threshold = magnitudes.flatten().sort().values[int(sparsity * magnitudes.numel())]
        kept = (magnitudes >= threshold).double().mean(0)
        for found, values in ((self.energy, energy / energy.mean()), (self.kept, kept)):
            found.setdefault(p.input, []).append(values.sort(descending=True).values.cpu())

    def errors(self, sparsity: float) -> ByLayer:
        """Nats a token [layer][name], each projection alone at this sparsity."""
        return [{name: float(np.interp(sparsity, GRID, c)) for name, c in layer.items()} for layer in self.curves]

    def allocation(self, sizes: dict[str, int], target: float) -> ByLayer:
        """The sparsities [layer][name] that together cost least; sizes: weights of each projection."""
        curves = [{n: list(zip(GRID, c, strict=True)) for n, c in layer.items()} for layer in self.curves]
        return allocate_by_layer(curves, [sizes] * len(curves), target)

    def row(self, weights: str, sparsity: float, shares: ByLayer) -> dict[str, Any]:
        """The figures in brief; shares: those of allocation."""
        energy, kept = mean(self.energy["normed"]), mean(self.kept["normed"])
        C = len(energy)
        chosen = [
            float(np.interp(share, GRID, self.curves[i][name]))
            for i, layer in enumerate(shares)
            for name, share in layer.items()
        ]
        return {
            "weights": weights,
            "energy_of_a_sixteenth": float(energy[: C // 16].sum() / energy.sum()),
            "channels_nearly_always_kept": float((torch.cat(self.kept["normed"]) > OFTEN).double().mean()),
            "kept_entries_in_half": float(kept[: C // 2].sum() / kept.sum()),
            "nats_uniform": sum(sum(layer.values()) for layer in self.errors(sparsity)),
            "nats_global": sum(chosen),
        }


def mean(parts: Sequence[Tensor]) -> Tensor:
    """Over tensors of one shape."""
    return torch.stack(list(parts)).mean(0)


def rotated(block: Block, p: Projection, plain: Samples, Q: Tensor, R: Tensor) -> Samples:
    """Inputs and gradients [n, K] of p as the rotated model has them: Q fp32 [C, C], R fp32 [KV heads, D, D]."""
    x, v = plain.inputs.float(), plain.gradients.float()
    if p.input == "normed":
        norm = block.get_submodule(p.norm)
        assert isinstance(norm, RMSNorm)
        weight = norm.weight.float()
        return Samples(x / weight @ Q, v * weight @ Q)
    if p.input == "attended":
        heads = (len(x), len(R), -1, R.shape[-1])
        return Samples(*(torch.einsum("nkgd,kde->nkge", t.view(heads), R).reshape(t.shape) for t in (x, v)))
    return plain


@torch.inference_mode()
def measure(model: Transformer, rotation: Rotation, sequences: Tensor, sparsity: float) -> dict[str, Measured]:
    """By WEIGHTS, on token ids int64 [N, L] that the rotation was not found on."""
    if rotation.residual is None:
        raise UserError(
            "this family has other norms than RMS norms before sublayers: no rotated residual stream to measure"
        )
    device = model.device
    Q, found = rotation.residual.to(device), {weights: Measured() for weights in WEIGHTS}
    backward = BackwardPass(model, sequences, Settings().gradient_tokens)
    backward.forward()
    for i in progress(range(len(model.blocks))[::-1], "measuring channels", "block"):
        block, samples = model.blocks[i], backward.samples(i)
        layers: dict[str, dict[str, list[float]]] = {weights: {} for weights in WEIGHTS}
        for p in block.projections():
            for name in p.names:
                of = {"plain": samples[name], "rotated": rotated(block, p, samples[name], Q, rotation.heads[i].to(Q))}
                for weights in WEIGHTS:
                    same = weights == "rotated" and of["rotated"] is of["plain"]
                    own = of[weights]
                    layers[weights][name] = layers["plain"][name] if same else error_curve(own.inputs, own.gradients)
                    if name == p.names[0]:  # what is stacked in a linear layer shares its input
                        found[weights].note(p, own.inputs, sparsity)
        for weights in WEIGHTS:
            found[weights].curves.insert(0, layers[weights])
    return found


def draw(found: dict[str, Measured], shares: dict[str, ByLayer], sparsity: float, folder: Path) -> list[Path]:
    """The figures in folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in FIGURES]
    kinds = {"normed": "inputs of q, k, v, gate, up", "attended": "inputs of o"}
    lines = {
        (kind, weights): (mean(found[weights].energy[input]).numpy(), mean(found[weights].kept[input]).numpy())
        for input, kind in kinds.items()
        for weights in WEIGHTS
    }
    plot_channels(lines, sparsity, paths[0])
    errors = {weights: found[weights].errors(sparsity) for weights in WEIGHTS}
    plot_by_layer(errors, f"nats a token at {sparsity:.0%}", paths[1], log=True)
    plot_by_layer(shares, f"sparsity, {sparsity:.0%} in all", paths[2])
    return paths


def build_parser() -> cli.Parser:
    """The command line of bench.energy."""
    parser = cli.Parser("Draw what a rotation does to a model's channels: their energy, what is kept, what it costs.")
    add_model_arguments(parser)
    text = parser.add_argument_group("text")
    add_text_arguments(text)
    text.add_argument(
        "--sequences",
        type=cli.positive_int,
        default=CALIBRATION_SEQUENCES,
        help="token sequences to measure on; four times as many give the rotation",
    )
    text.add_argument("--length", type=cli.positive_int, default=CALIBRATION_LENGTH, help="tokens each")
    group = parser.add_argument_group("what to draw, and where to")
    group.add_argument("--sparsity", type=cli.sparsity, default=0.5, help="share of the entries that is dropped")
    group.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder for three PNGs")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and draw."""
    loaded = load_for_decoding(model_options(args, sparsity=0.0, dequantize=True), sparse=True)
    encode, text = loaded.encode, read_texts(args.text, args.field)
    size = (args.sequences, min(args.length, loaded.model.config.max_seq_len))
    other = token_sequences(encode, split_text(text, rotated=True)[0], *size)
    fitted = spread_sequences(encode, rotation_text(text), ROTATION_SHARE * args.sequences, size[1])
    found = measure(loaded.model, find_rotation(loaded.model, fitted), other, args.sparsity)
    sizes = weight_counts(loaded.model.config.projections())
    shares = {weights: found[weights].allocation(sizes, args.sparsity) for weights in WEIGHTS}
    rows = [found[weights].row(weights, args.sparsity, shares[weights]) for weights in WEIGHTS]
    figures = [str(path) for path in draw(found, shares, args.sparsity, args.output)]
    tokens = {"rotation_tokens": fitted.numel(), "tokens": pieces_of(other, Settings().gradient_tokens).numel()}
    return {"model": loaded.name, "sparsity": args.sparsity} | tokens | {"figures": figures, "rows": rows}


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each of the plain and the rotated weights."""
    for row in rows:
        print(
            f"{row['weights']:>8}  {row['energy_of_a_sixteenth']:5.1%} of the energy in a sixteenth of the channels,"
            f" {row['kept_entries_in_half']:5.1%} of the kept entries in half of them,"
            f" {row['channels_nearly_always_kept']:4.1%} of them kept by more than {OFTEN:.0%} of the tokens;"
            f" {row['nats_uniform']:.3f} nats uniform, {row['nats_global']:.3f} global"
        )


def main() -> None:
    """Measure, draw and print; the last line is JSON."""
    args = build_parser().parse_args()
    require_matplotlib("bench.energy")
    check_targets((args.sparsity,))
    with reserved(*(Output("-o", args.output / name, FIGURE) for name in FIGURES)):
        result = run(args)
    print_rows(result["rows"])
    print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
