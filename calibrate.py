"""Calibrate activation sparsity: python calibrate.py --sparsity 0.4,0.5 --method greedy -o plans/"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.cli import command_line as cli
from teal.cli.options import add_model_arguments, add_text_arguments, model_options
from teal.errors import UserError
from teal.files import Output, cache_folder, check_writable, reserved
from teal.options import CALIBRATION_LENGTH, CALIBRATION_SEQUENCES, METHODS, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from teal.checkpoint.loading import Described
    from teal.model import Projection
    from teal.plan import Histogram, SparsityPlan

ROTATION_TOKENS = 10  # for each channel. Uniform plans of the default model lose 15% more with 0.5, 9% less with 2
ROTATION_SHARE = 4  # sequences to find a rotation on, to one for thresholds, as far as the text goes


def build_parser() -> cli.Parser:
    """The command line of calibrate.py."""
    parser = cli.Parser("Find the thresholds that give a model a wanted activation sparsity; write them as a plan.")
    add_model_arguments(parser)
    what = parser.add_argument_group("what to calibrate")
    default = Settings()
    what.add_argument(
        "--sparsity", type=cli.sparsities, default=default.targets, help="target, or several with commas between"
    )
    what.add_argument(
        "--method", choices=METHODS,
        help="same for all; Algorithm 1, block by block; or over all layers, where gradients predict least divergence "
        f"({default.method} unless given, uniform of published plans)",
    )  # fmt: skip
    what.add_argument(
        "--step", type=float, default=default.step, help="greedy: average sparsity added to a projection a step"
    )
    what.add_argument(
        "--rotate", type=Path, metavar="FOLDER",
        help="first write the model there in a basis of few strong channels, then calibrate that one",
    )  # fmt: skip
    text = parser.add_argument_group("text")
    add_text_arguments(text)
    text.add_argument(
        "--sequences", type=cli.positive_int, default=CALIBRATION_SEQUENCES, help="token sequences to use"
    )
    text.add_argument(
        "--length", type=cli.positive_int, default=CALIBRATION_LENGTH, help="tokens each, capped to context"
    )
    text.add_argument("--offload", action="store_true", help="keep activations in host memory between blocks")
    out = parser.add_argument_group("output")
    out.add_argument("-o", "--output", type=Path, help="plan file, or folder for several; without it beside the model")
    out.add_argument("--plot", type=Path, metavar="FOLDER", help="also draw distributions and sparsities as PNG there")
    other = parser.add_argument_group("instead of calibrating")
    other.add_argument("--show", type=Path, metavar="PLAN", help="print a plan as a table")
    other.add_argument("--import-teal", type=Path, metavar="FOLDER", help="plan from TEAL's published models/<Model>")
    return parser


def main() -> None:
    """Calibrate, import or show; then draw."""
    args = build_parser().parse_args()
    cli.require_package("matplotlib", "--plot", args.plot)
    if args.show is not None:
        from teal.plan import SparsityPlan

        plan = SparsityPlan.load(args.show)
        print_plan(plan)
        with reserved(*outputs([], args.plot, (plan.target,))):
            draw([plan], args.plot)
    elif args.import_teal is not None:
        from teal.calibration.published import import_teal

        paths = output_paths(args, args.import_teal.name.lower())
        with reserved(*outputs(paths, args.plot, args.sparsity)):
            plans = [import_teal(args.import_teal, target, args.method or METHODS[0]) for target in args.sparsity]
            save(plans, paths)
            draw(plans, args.plot)
    else:
        calibrate_model(args)


def calibrate_model(args: argparse.Namespace) -> None:
    """Load the text and the model, calibrate for every target. What cannot be written is refused before the loading."""
    if args.output is not None:
        check_writable("-o", output_paths(args, "model")[0])
    settings = Settings(args.sparsity, args.method or Settings().method, args.step)
    text = CalibrationText(args)
    if args.rotate is not None:
        rotate_model(args, text)
    paths = calibrated_paths(args)
    with reserved(*outputs(paths, args.plot, args.sparsity)):
        write_plans(args, settings, text, paths)


class CalibrationText:
    """The text that args name. The first model to be loaded cuts it, before minutes of work: it may be too short.

    sequences: tokens to calibrate on, as args want them, int64 [N, L]; held_out: those to measure sparsity on.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from teal.calibration.texts import read_texts

        self.args, self.text = args, read_texts(args.text, args.field)
        self.sequences: Tensor | None = None
        self.held_out: Tensor | None = None

    def cut(self, model: "Described") -> None:
        """Cut the text by the tokenizer of model, if no other did. Raises UserError if it is too short."""
        from teal.calibration.texts import split_sequences
        from teal.calibration.thresholds import HELD_OUT_SEQUENCES, QUICK_LENGTH

        if self.sequences is None:
            args, limit = self.args, model.config.max_seq_len
            sizes = (args.sequences, min(args.length, limit)), (HELD_OUT_SEQUENCES, min(QUICK_LENGTH, limit))
            rotated = model.is_rotated or args.rotate is not None
            self.sequences, self.held_out = split_sequences(model.encode, self.text, *sizes, rotated)

    def facts(self, sequences: "Tensor") -> dict[str, Any]:
        """What is kept of the text and of sequences [N, L] cut from it."""
        from teal.calibration.texts import text_hash

        return {"text": text_hash(self.text), "sequences": len(sequences), "length": sequences.shape[1]}


def rotate_model(args: argparse.Namespace, text: CalibrationText) -> None:
    """Write the model of args to args.rotate in the basis found on a part of text, which args then name as theirs.

    A folder that an earlier call wrote is taken as it is. Raises UserError.
    """
    from teal.calibration.rotation import find_rotation
    from teal.calibration.texts import rotation_text, spread_sequences
    from teal.checkpoint.loading import load_for_decoding
    from teal.checkpoint.rotation import check_can_rotate, write_rotated
    from teal.checkpoint.source import resolve_checkpoint

    if args.random_weights is not None:
        raise UserError("--rotate does not go with --random-weights: they have no energy to sort")

    with reserved(Output("--rotate", args.rotate, None)):
        source = resolve_checkpoint(args.checkpoint, args.adapter)
        if not check_can_rotate(source, args.rotate):
            loaded = load_for_decoding(model_options(args, sparsity=0.0, dequantize=True), text.cut)
            length = min(args.length, loaded.model.config.max_seq_len)
            most = ROTATION_SHARE * args.sequences
            sequences = spread_sequences(loaded.encode, rotation_text(text.text), most, length)
            channels = loaded.model.config.hidden_size
            if sequences.numel() < ROTATION_TOKENS * channels:
                print(
                    f"warning: {sequences.numel()} tokens are few for a rotation of {channels} channels; fewer than "
                    f"{ROTATION_TOKENS} for each can do harm (--text, --sequences)", file=sys.stderr,
                )  # fmt: skip
            rotation = find_rotation(loaded.model, sequences, args.offload)
            if rotation.residual is None:
                note = "this family has other norms than RMS norms before sublayers: only its heads are rotated"
                print(note, file=sys.stderr)
            del loaded
            write_rotated(source, args.rotate, rotation, text.facts(sequences))
            print(args.rotate)
    args.checkpoint, args.adapter = str(args.rotate), None


def write_plans(args: argparse.Namespace, settings: Settings, text: CalibrationText, paths: list[Path]) -> None:
    """Calibrate and write the plans at once, then again with the sparsities they achieve."""
    from teal.calibration.thresholds import calibrate, with_achieved
    from teal.checkpoint.loading import load_for_decoding

    loaded = load_for_decoding(model_options(args, sparsity=0.0, dequantize=True), text.cut, sparse=True)
    assert text.sequences is not None and text.held_out is not None
    facts = text.facts(text.sequences)
    request = json.dumps([loaded.identity, facts, settings.targets, settings.method, settings.step])
    progress = cache_folder("calibration") / f"{hashlib.sha256(request.encode()).hexdigest()[:16]}.json"
    seen: list[list[dict[str, Histogram]]] = []
    histograms = seen if args.plot else None
    plans = calibrate(
        loaded.model, text.sequences, settings, facts, args.offload, progress, histograms, loaded.weights,
        save=lambda found: save(found, paths),
    )  # fmt: skip
    for plan, path in zip(plans, paths, strict=True):
        measured = with_achieved(loaded.model, plan, text.held_out)
        measured.save(path)
        if warning := measured.warning(measured.achieved, text.held_out.numel(), "held-out text"):
            print(warning, file=sys.stderr)
    draw(plans, args.plot, seen, loaded.model.config.projections())


def calibrated_paths(args: argparse.Namespace) -> list[Path]:
    """Where the plans of args' model go, which is downloaded and converted if need be, but not loaded."""
    from teal.checkpoint.source import name_for_people, resolve_checkpoint

    if args.random_weights is not None:
        return output_paths(args, args.random_weights)
    folder = resolve_checkpoint(args.checkpoint, args.adapter)
    return output_paths(args, name_for_people(folder, args.checkpoint, args.adapter), folder)


def outputs(paths: list[Path], folder: Path | None, targets: tuple[float, ...]) -> list[Output]:
    """All files that a run writes: the plans, and figures in folder, if one is given. Figures need matplotlib."""
    from teal.plan import PLAN

    found = [Output("-o", path, PLAN) for path in paths]
    if folder is None:
        return found
    from teal.evaluation.plots import FIGURE, require_matplotlib

    require_matplotlib("--plot")
    names = [f"{what}-{target:g}.png" for target in targets for what in ("sparsity", "inputs")]
    return found + [Output("--plot", folder / name, FIGURE) for name in names]


def output_paths(args: argparse.Namespace, name: str, folder: Path | None = None) -> list[Path]:
    """Where each target's plan goes. Raises UserError if one file is named for several, or the folder is missing."""
    from teal.plan import plan_name

    output = args.output
    if output is not None and output.suffix == ".json":
        if len(args.sparsity) > 1:
            raise UserError(f"-o {output}: names one file for {len(args.sparsity)} sparsities; give a folder")
        paths = [output]
    else:
        base = output if output is not None else folder if folder is not None else Path()
        prefix = "" if folder is not None and output is None else f"{Path(name).name}-"
        paths = [base / f"{prefix}{plan_name(target)}" for target in args.sparsity]
    if not paths[0].parent.is_dir():
        raise UserError(f"-o {paths[0].parent}: no such folder; create it first")
    return paths


def save(plans: "list[SparsityPlan]", paths: list[Path]) -> None:
    """Write the plans and say where."""
    for plan, path in zip(plans, paths, strict=True):
        plan.save(path)
        print(path)


def print_plan(plan: "SparsityPlan") -> None:
    """A plan as a table: sparsity, threshold and, if measured, achieved sparsity by layer and projection."""
    names = list(plan.layers[0])
    print(f"{plan.method}, target {plan.target:g}, {len(plan.layers)} layers; {plan.calibration}")
    print("layer  " + "".join(f"{name:>22}" for name in names) + "\n       " + "  sparsity/thresh/achvd" * len(names))
    for i, layer in enumerate(plan.layers):
        cells = [
            f"{p.sparsity:9.3f}{p.threshold:8.4f}" + ("    -" if p.achieved is None else f"{p.achieved:5.2f}")
            for p in layer.values()
        ]
        print(f"{i:5d}  " + "".join(cells))


def draw(
    plans: "list[SparsityPlan]",
    folder: Path | None,
    seen: "list[list[dict[str, Histogram]]] | None" = None,
    projections: "tuple[Projection, ...]" = (),
) -> None:
    """PNGs of the plans in folder, if one is given; seen: histograms [block][plan] of the inputs of projections."""
    if folder is None:
        return
    from teal.evaluation.plots import plot_inputs, plot_sparsities

    folder.mkdir(parents=True, exist_ok=True)
    for j, plan in enumerate(plans):
        plot_sparsities(plan, folder / f"sparsity-{plan.target:g}.png")
        if seen:
            plot_inputs([block[j] for block in seen], plan, projections, folder / f"inputs-{plan.target:g}.png")
    print(f"figures in {folder}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
