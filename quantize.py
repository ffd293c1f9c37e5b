"""Quantize a checkpoint's weights: python quantize.py --checkpoint DIR --mode int4 -o OUT

Hugging Face folder in, Hugging Face-style folder out, which every other command takes as --checkpoint. One layer at a
time: memory holds a tensor in floats and the layer's quantized weights. An interrupted run goes on where it stopped.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal.cli import command_line as cli
from teal.cli.options import add_checkpoint_argument, add_device_argument, add_head_argument, add_text_arguments
from teal.errors import UserError
from teal.options import QUANTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from teal.layers.quantized_linear import Packed, QuantConfig

    Rounding = Callable[[Tensor, int, int], Packed]

SKIPPED_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pth", ".pt", ".gguf")
MARKER = "progress.json"  # in the work folder: which job it is of
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Beside shards what a folder may hold that an older release wrote, without a list of its files.
PLAIN_FILES = {
    "config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line of quantize.py."""
    parser = cli.Parser("Quantize a checkpoint's weights to 8 or 4 bits.")
    what = parser.add_argument_group("what to quantize")
    add_checkpoint_argument(what)
    what.add_argument("--mode", choices=QUANTS, required=True, help="bits of a weight")
    what.add_argument(
        "--group-size", type=cli.positive_int, help="weights to a scale; without it the largest that fits"
    )
    what.add_argument(
        "--method",
        choices=("rtn", "hqq", "gptq"),
        default="rtn",
        help="round to nearest, half-quadratic fit of scales and zeros, or GPTQ on a calibration text",
    )
    add_head_argument(what, "quantize the output head too")
    what.add_argument(
        "--grouping",
        choices=("output", "input"),
        default="output",
        help="dimension along which groups lie; input is the usual one, for comparison",
    )
    out = parser.add_argument_group("output")
    out.add_argument("--force", action="store_true", help="replace an output folder that this command wrote")
    out.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    calibration = parser.add_argument_group("calibration of --method gptq")
    add_text_arguments(calibration)
    calibration.add_argument("--sequences", type=cli.positive_int, default=32, help="token sequences")
    calibration.add_argument("--length", type=cli.positive_int, default=512, help="tokens each")
    add_device_argument(calibration)
    return parser


def main() -> None:
    """Quantize and say what came of it on stderr."""
    args = build_parser().parse_args()
    if args.checkpoint is not None:
        check_apart(args.output, Path(args.checkpoint).expanduser())
    check_output(args.output, args.force)
    from teal.checkpoint.config import load_config, load_quantization
    from teal.checkpoint.source import resolve_checkpoint
    from teal.checkpoint.weights import find_shards
    from teal.layers.quantized_linear import QuantConfig, pick_group_size

    source = resolve_checkpoint(args.checkpoint)
    config = load_config(source)
    if load_quantization(source) is not None:
        raise UserError(f"--checkpoint {args.checkpoint}: is quantized already; give the original model")
    head = args.lm_head == "int8"
    scheme = QuantConfig(args.mode, pick_group_size(config, args.group_size, head), head, args.grouping)
    sequences = calibration_sequences(args, source, config.max_seq_len) if args.method == "gptq" else None
    before = sum(shard.stat().st_size for shard in find_shards(source))
    quantize_folder(source, args.output, scheme, args.method, sequences, args.device, args.force)
    after = sum(shard.stat().st_size for shard in find_shards(args.output))
    print(
        f"{args.output}: {args.mode} by {args.method}, groups of {scheme.group_size} along the {args.grouping}, "
        f"{before / 1e6:.0f} -> {after / 1e6:.0f} MB",
        file=sys.stderr,
    )


def calibration_sequences(args: argparse.Namespace, source: Path, limit: int) -> "Tensor":
    """Token ids [sequences, length] of the calibration text. Raises UserError if it is too short."""
    from teal.calibration.texts import read_texts, token_sequences
    from teal.checkpoint.tokenizer import load_tokenizer

    text = read_texts(args.text, args.field)
    return token_sequences(load_tokenizer(source).encode, text, args.sequences, min(args.length, limit))


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
    from teal.checkpoint.config import read_json
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


def check_apart(output: Path, source: Path) -> None:
    """Raise UserError if output is the source, holds it or lies in it, by whatever names."""

    def same(one: Path, other: Path) -> bool:
        return one.exists() and other.exists() and one.samefile(other)

    target, source = output.resolve(), source.resolve()
    if same(target, source):
        raise UserError(f"--output {output}: is the checkpoint itself; name another folder")
    if any(same(target, folder) for folder in source.parents):
        raise UserError(f"--output {output}: holds the checkpoint; name another folder")
    if any(same(folder, source) for folder in target.parents):
        raise UserError(f"--output {output}: lies in the checkpoint; name a folder outside it")


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

    method: "rtn", "hqq" or "gptq"; the last runs on device, for sequences of token ids. Raises UserError, also
    if output exists, but for one that this function wrote, with force.
    """
    from teal.files import Output, replace_folder, reserved, restore_folder

    check_apart(output, source)
    with reserved(Output("--output", output, None)):
        target = output.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(target)
        check_output(output, force)
        work = target.with_name(f".{target.name}.part")
        _start_or_resume(work, source, scheme, method, sequences)
        _write_shards(source, work, scheme, method, sequences, device)
        _write_the_rest(source, work, scheme)
        (work / MARKER).unlink()
        replace_folder(work, target)


def _write_the_rest(source: Path, work: Path, scheme: "QuantConfig") -> None:
    """What is not weights: copies of tokenizer, plans and the like, and a config that lists all files."""
    from teal.checkpoint.config import read_json
    from teal.checkpoint.weights import stored_config, weights_identity
    from teal.files import atomic_file, fingerprint

    for path in source.iterdir():
        skipped = path.name.endswith(SKIPPED_FILES) or path.name.startswith(".") or not path.is_file()
        if not skipped:
            shutil.copyfile(path, work / path.name)
    files = {
        path.name: fingerprint(path) for path in sorted(work.iterdir()) if path.name not in (MARKER, "config.json")
    }
    description = read_json(source / "config.json")
    description["tie_word_embeddings"] = stored_config(source).tie_embeddings
    origin = {"name": source.name, "identity": weights_identity(source)}  # so that its plans fit
    description["quantization_config"] = {**scheme.as_json(), "source": origin, "files": files}
    with atomic_file(work / "config.json") as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _start_or_resume(
    work: Path, source: Path, scheme: "QuantConfig", method: str, sequences: "Tensor | None"
) -> None:  # fmt: skip
    """Make work a folder of this very job. What another job left there goes. Raises UserError for other content."""
    from teal.checkpoint.weights import model_identity
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


def _write_shards(
    source: Path,
    work: Path,
    scheme: "QuantConfig",
    method: str,
    sequences: "Tensor | None",
    device: str,
) -> None:
    """A shard for each layer and one for the rest, skipping those that are there, and their index."""
    from safetensors.torch import save_file

    from teal.checkpoint.config import load_config
    from teal.checkpoint.weights import hf_projection_names, open_shard
    from teal.files import atomic_file
    from teal.layers.quantized_linear import round_to_nearest
    from teal.progress import progress
    from teal.quantization.half_quadratic import half_quadratic

    rounding = {"rtn": round_to_nearest, "hqq": half_quadratic, "gptq": None}[method]
    jobs = _jobs(source, scheme)
    projections = hf_projection_names(load_config(source))
    gptq = None
    if sequences is not None:
        from teal.hardware import pick_device
        from teal.quantization.gptq import BlockwiseGptq

        where = {name: path for names in jobs for name, path in names.items()}
        gptq = BlockwiseGptq(source, scheme, sequences, where, pick_device(device))
    index: dict[str, str] = {}
    total = 0
    for i, names in enumerate(progress(jobs, "quantizing", "layer")):
        path = work / f"model-{i + 1:05}-of-{len(jobs):05}.safetensors"
        is_layer = i + 1 < len(jobs)
        if not path.exists():
            tensors = _quantized_tensors(names, projections, scheme, rounding)
            if gptq is not None and is_layer:
                tensors |= gptq.layer(i)
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
        elif gptq is not None and is_layer:
            gptq.skip(i, path)
        with open_shard(path) as shard:
            index |= dict.fromkeys(shard.keys(), path.name)
        total += path.stat().st_size
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (work / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _jobs(source: Path, scheme: "QuantConfig") -> list[dict[str, Path]]:
    """The tensors of each output shard by name, with the file that holds them: the layers, then all else."""
    from teal.checkpoint.weights import find_shards, open_shard, stored_config

    where: dict[str, Path] = {}
    for shard in find_shards(source):
        with open_shard(shard) as tensors:
            where |= dict.fromkeys(tensors.keys(), shard)
    config = stored_config(source)
    if scheme.lm_head and config.tie_embeddings:
        where["lm_head.weight"] = where["model.embed_tokens.weight"]
    elif config.tie_embeddings:
        where.pop("lm_head.weight", None)
    prefixes = [f"model.layers.{i}." for i in range(config.num_layers)]
    jobs = [{name: path for name, path in where.items() if name.startswith(prefix)} for prefix in prefixes]
    layers = set().union(*jobs)
    return [*jobs, {name: path for name, path in where.items() if name not in layers}]


def _quantized_tensors(
    names: dict[str, Path], projections: set[str], scheme: "QuantConfig", rounding: "Rounding | None"
) -> dict[str, "Tensor"]:  # fmt: skip
    """What a shard holds of these tensors: weights of projections rounded, or left out, the rest as it is.

    Raises UserError.

    The head is rounded to nearest, of 8 bits.
    """
    from teal.checkpoint.weights import is_finite, open_shard
    from teal.layers.quantized_linear import round_input_groups, round_to_nearest

    result: dict[str, Tensor] = {}
    dtypes: dict[Any, str] = {}
    for name, path in sorted(names.items()):
        with open_shard(path) as tensors:
            stored = "model.embed_tokens.weight" if name not in tensors.keys() else name  # noqa: SIM118 - a tied head
            tensor = tensors.get_tensor(stored)
        head = name == "lm_head.weight" and scheme.lm_head
        if tensor.is_floating_point() and not is_finite(tensor):
            raise UserError(f"{path}: {name} holds NaN or infinity; the checkpoint is damaged, download it again")
        prefix, _, part = name.rpartition(".")
        if not head and not (prefix in projections and part == "weight"):
            result[name] = tensor.contiguous()
            continue
        dtypes.setdefault(tensor.dtype, name)
        if len(dtypes) > 1:
            (one, first), (other, second) = dtypes.items()
            raise UserError(f"{path}: {first} is {one} and {second} is {other}; expected one dtype in a layer")
        rounded, bits = (round_to_nearest, 8) if head else (rounding, scheme.bits)
        if rounded is None:
            continue
        if scheme.by_input and not head:
            parts = round_input_groups(tensor, bits, scheme.group_size, rounded)
        else:
            parts = rounded(tensor.t().contiguous(), bits, scheme.group_size)
        result |= {
            f"{prefix}.{n}": t for n, t in zip(("qweight", "scales", "zeros"), parts, strict=True) if t is not None
        }
    return result


if __name__ == "__main__":
    cli.run(main)
