"""Quantize a checkpoint's weights: python quantize.py --checkpoint DIR --mode int4 -o OUT

Hugging Face folder in, Hugging Face-style folder out, which every other command takes as --checkpoint. One layer at a
time: memory holds a tensor in floats and the layer's quantized weights. Only --mode mixed has the whole model in memory
first, to find the channels that need 8 bits. An interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from teal.cli import command_line as cli
from teal.cli.options import (
    add_adapter_argument,
    add_checkpoint_argument,
    add_device_argument,
    add_head_argument,
    add_text_arguments,
)
from teal.errors import UserError
from teal.options import QUANTS

if TYPE_CHECKING:
    from torch import Tensor

    from teal.layers.quantized_linear import QuantConfig
    from teal.model import ModelConfig

DEFAULT_BITS = 4.25  # of --mode mixed
MARKER = "progress.json"  # in the work folder: which job it is of
REFINED = ".refined.json"  # there, too: the channels that --mode mixed chose; no copy of a file of the source
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Beside shards what a folder may hold that an older release wrote, without a list of its files.
PLAIN_FILES = {
    "config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line of quantize.py."""
    parser = cli.Parser("Quantize a checkpoint's weights to 8 bits, 4 bits, or 8 where energy is and 4 elsewhere.")
    what = parser.add_argument_group("what to quantize")
    add_checkpoint_argument(what)
    add_adapter_argument(what)
    what.add_argument(
        "--mode",
        choices=(*QUANTS, "mixed"),
        required=True,
        help="bits of a weight; mixed: 4, and 8 for the channels that carry the most energy on a calibration text",
    )
    what.add_argument(
        "--bits", type=float, help=f"of --mode mixed: average bits of a weight, 4 to 8; {DEFAULT_BITS} unless given"
    )
    what.add_argument(
        "--group-size", type=cli.positive_int, help="weights to a scale; without it the largest that fits"
    )
    what.add_argument(
        "--method",
        choices=("rtn", "hqq", "gptq"),
        default="rtn",
        help="round to nearest, half-quadratic fit of scales and zeros, or GPTQ on a calibration text",
    )
    add_head_argument(
        what, "quantize the output head too: 8 bits to nearest, 4 by --method; mixed: as --mode mixed", "mixed"
    )
    what.add_argument(
        "--embedding", choices=("none", "int8"), default="none",
        help="round the embedding too, which saves memory; with --lm-head where the head is the same weight",
    )  # fmt: skip
    what.add_argument(
        "--grouping",
        choices=("output", "input"),
        default="output",
        help="dimension along which groups lie; input is the usual one, for comparison (not with --mode mixed)",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--force", action="store_true", help="replace an output folder that this command wrote")
    out.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    calibration = parser.add_argument_group("calibration of --method gptq and --mode mixed")
    add_text_arguments(calibration)
    calibration.add_argument("--sequences", type=cli.positive_int, default=32, help="token sequences")
    calibration.add_argument("--length", type=cli.positive_int, default=512, help="tokens each")
    add_device_argument(calibration)
    return parser


def main() -> None:
    """Quantize and say what came of it on stderr."""
    args = build_parser().parse_args()
    check_mode(args)
    for what, name in (("checkpoint", args.checkpoint), ("adapter", args.adapter)):
        if name is not None:
            check_apart(args.output, Path(name).expanduser(), what)
    check_output(args.output, args.force)
    from teal.checkpoint.source import check_family, resolve_checkpoint

    check_family(args.checkpoint)
    from teal.checkpoint.config import load_quantization
    from teal.checkpoint.weights import find_shards, stored_config

    source = resolve_checkpoint(args.checkpoint, args.adapter)
    config = stored_config(source)
    if load_quantization(source) is not None:
        raise UserError(f"--checkpoint {args.checkpoint}: is quantized already; give the original model")
    scheme = scheme_of(args, config)
    needs_text = args.method == "gptq" or scheme.is_mixed
    sequences = calibration_sequences(args, source, config.max_seq_len) if needs_text else None
    before = sum(shard.stat().st_size for shard in find_shards(source))
    quantize_folder(source, args.output, scheme, args.method, sequences, args.device, args.force)
    after = sum(shard.stat().st_size for shard in find_shards(args.output))
    print(
        f"{args.output}: {mode_name(scheme)} by {args.method}, "
        f"groups of {scheme.group_size} along the {args.grouping}, {before / 1e6:.0f} -> {after / 1e6:.0f} MB",
        file=sys.stderr,
    )


def check_mode(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not go with --mode, before anything is read."""
    if args.mode == "mixed":
        check_method(args.mode, args.method)
        if args.lm_head == "int4":
            raise UserError("--lm-head int4 does not go with --mode mixed; choose mixed or int8")
    elif args.bits is not None:
        raise UserError(f"--bits {args.bits:g} goes with --mode mixed; leave it out")
    elif args.lm_head == "mixed":
        raise UserError("--lm-head mixed goes with --mode mixed; choose int8 or int4")


def check_method(mode: str, method: str) -> None:
    """Raise UserError unless weights can be rounded to mode by method."""
    if mode == "mixed" and method == "hqq":
        raise UserError("--method hqq does not go with --mode mixed; choose rtn or gptq")


def scheme_of(args: argparse.Namespace, config: "ModelConfig") -> "QuantConfig":
    """What args ask for, of a model. Raises UserError."""
    from teal.layers.quantized_linear import QuantConfig, pick_group_size

    head = args.lm_head != "none"
    group_size = pick_group_size(config, args.group_size, head)
    embedding, head_bits = args.embedding == "int8", 4 if args.lm_head in ("int4", "mixed") else 8
    scheme = QuantConfig(args.mode, group_size, head, args.grouping, embedding, average_bits(args), head_bits)
    scheme.check_embedding(config)
    return scheme


def average_bits(args: argparse.Namespace) -> float | None:
    """Of a weight of --mode mixed; None for the other modes."""
    if args.mode != "mixed":
        return None
    return DEFAULT_BITS if args.bits is None else args.bits


def mode_name(scheme: "QuantConfig") -> str:
    """For people: the mode, and the bits of a mixed one."""
    return f"mixed ({scheme.average_bits:g} bits)" if scheme.is_mixed else scheme.mode


def calibration_sequences(args: argparse.Namespace, source: Path, limit: int) -> "Tensor":
    """Token ids [sequences, length] of the calibration text. Raises UserError if it is too short."""
    from teal.calibration.texts import read_texts, token_sequences
    from teal.checkpoint.loading import describe

    text = read_texts(args.text, args.field)
    return token_sequences(describe(str(source)).encode, text, args.sequences, min(args.length, limit))


def check_output(output: Path, force: bool) -> None:
    """Raise UserError unless output can be written: nothing is there, or with force what this command wrote."""
    from teal.files import check_writable

    check_writable("--output", output)
    if not output.exists():
        return
    if not force:
        raise UserError(f"--output {output}: exists; remove it, name another or pass --force")
    if reason := _foreign(output.resolve()):
        raise UserError(
            f"--output {output}: {reason}; --force replaces only what quantize.py wrote: name another folder"
        )


def _foreign(folder: Path) -> str | None:
    """Why folder is not one that this command wrote, with all files as they were then and no others; None if it is."""
    from teal.checkpoint.fields import read_json
    from teal.files import fingerprint
    from teal.layers.quantized_linear import QuantConfig

    if not folder.is_dir() or folder.is_symlink():
        return "is no folder"
    path = folder / "config.json"
    try:
        scheme = read_json(path).get("quantization_config")
        scheme = scheme if isinstance(scheme, dict) else {}
        QuantConfig.from_json(scheme, str(path))
    except UserError:
        return "is not a checkpoint that it quantized"
    written = scheme.get("files")
    for entry in sorted(folder.iterdir()):
        if not entry.is_file() or entry.is_symlink():
            return f"holds {entry.name}"
        if entry == path:
            continue
        if not isinstance(written, dict):
            if entry.name not in PLAIN_FILES and not SHARD.fullmatch(entry.name):
                return f"holds {entry.name}"
        elif written.get(entry.name) != fingerprint(entry):
            return f"holds {entry.name}" + (", changed since it was written" if entry.name in written else "")
    return None


def check_apart(output: Path, source: Path, what: str = "checkpoint") -> None:
    """Raise UserError if output is the source, holds it or lies in it, by whatever names. what: the source's role."""

    def same(one: Path, other: Path) -> bool:
        return one.exists() and other.exists() and one.samefile(other)

    target, source = output.resolve(), source.resolve()
    if same(target, source):
        raise UserError(f"--output {output}: is the {what} itself; name another folder")
    if any(same(target, folder) for folder in source.parents):
        raise UserError(f"--output {output}: holds the {what}; name another folder")
    if any(same(folder, source) for folder in target.parents):
        raise UserError(f"--output {output}: lies in the {what}; name a folder outside it")


def quantize_folder(
    source: Path,
    output: Path,
    scheme: "QuantConfig",
    method: str = "rtn",
    sequences: "Tensor | None" = None,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Write source's quantized model to output, through a folder beside it that a later call may go on with.

    method: "rtn", "hqq" or "gptq". The last one, and mode mixed, run on device for sequences of token ids. Raises
    UserError, also if output exists, but for one that this function wrote, with force.
    """
    from teal.checkpoint.config import load_config
    from teal.files import Output, replace_folder, reserved, restore_folder
    from teal.quantization.shards import Rounding, write_shards

    check_method(scheme.mode, method)
    check_apart(output, source)
    with reserved(Output("--output", output, None)):
        target = output.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(target)
        check_output(output, force)
        work = target.with_name(f".{target.name}.part")
        _start_or_resume(work, source, scheme, method, sequences)
        refined: dict[str, Tensor] = {}
        if scheme.is_mixed:
            from teal.quantization.refinement import refined_channels, with_counts

            assert sequences is not None
            refined = refined_channels(source, scheme, sequences, device, work / REFINED)
            scheme = with_counts(scheme, load_config(source), refined)
        write_shards(source, work, scheme, Rounding(method, refined, sequences, device))
        _write_the_rest(source, work, scheme)
        for name in (REFINED, MARKER):  # the marker last: without it the rest is no folder of ours
            (work / name).unlink(missing_ok=True)
        replace_folder(work, target)


def _write_the_rest(source: Path, work: Path, scheme: "QuantConfig") -> None:
    """What is not weights: copies of tokenizer, plans and the like, and a config that lists all files."""
    from teal.checkpoint.identity import stored_weights
    from teal.checkpoint.layout import plain_description
    from teal.checkpoint.weights import copy_other_files, stored_config
    from teal.files import atomic_file, fingerprint

    copy_other_files(source, work)
    own = (MARKER, REFINED, "config.json")
    files = {path.name: fingerprint(path) for path in sorted(work.iterdir()) if path.name not in own}
    description = plain_description(source)
    description["tie_word_embeddings"] = stored_config(source).tie_embeddings
    origin = stored_weights(source, source.name)  # so that its plans fit
    assert origin is not None
    description["quantization_config"] = {**scheme.as_json(), "source": asdict(origin), "files": files}
    with atomic_file(work / "config.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _start_or_resume(
    work: Path, source: Path, scheme: "QuantConfig", method: str, sequences: "Tensor | None"
) -> None:  # fmt: skip
    """Make work a folder of this very job. What another job left there goes. Raises UserError for other content."""
    from teal.checkpoint.identity import model_identity
    from teal.files import atomic_file, sweep

    sweep(work, ".*.part")
    text = None if sequences is None else hashlib.sha256(sequences.numpy().tobytes()).hexdigest()
    key = {"source": model_identity(source), **scheme.as_json(), "method": method, "text": text}
    marker = work / MARKER
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == key:
        return
    if work.exists():
        is_ours = (
            work.is_dir()
            and not work.is_symlink()
            and (not any(work.iterdir()) or (isinstance(found, dict) and "source" in found))
        )
        if not is_ours and (reason := _foreign(work)):
            raise UserError(f"{work}: is where unfinished work goes, and {reason}; move it away")
        shutil.rmtree(work)
    work.mkdir()
    with atomic_file(marker) as temporary:
        temporary.write_text(json.dumps(key), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
