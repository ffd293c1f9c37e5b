"""LoRA adapter folders (Hu et al. 2021, arXiv 2106.09685): the base model with W + scale * B A in the place of W.

Merged once, a file at a time, into a folder that is a plain checkpoint of the base model's family. Of a GGUF file's
integers those that an adapter changes become fp16 floats.
"""

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teal.checkpoint.blocks import NO_FORMS, Shard, open_file, save_shard
from teal.checkpoint.config import load_quantization
from teal.checkpoint.fields import Fields, read_json
from teal.checkpoint.rotation import rotation_record
from teal.checkpoint.weights import INDEX, READABLE_DTYPES, copy_other_files, find_shards, write_index
from teal.errors import UserError
from teal.progress import progress

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of a tensor's name in the file, before its name in the base model
PARTS = {".lora_A.weight": 0, ".lora_B.weight": 1}
# Fields that would change the computation, with the values under which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}


def adapter_fields(folder: Path) -> Fields:
    """The adapter's config. Raises UserError if it means more than to add scale * B A to weights."""
    raw = Fields(folder / CONFIG, read_json(folder / CONFIG))
    for field, neutral in NEUTRAL.items():
        if raw.raw.get(field) not in neutral:
            raise UserError(
                f"{raw.path}: {field} {raw.raw.get(field)!r:.200} is not supported; expected {neutral[0]!r}"
            )  # fmt: skip
    return raw


def base_name(folder: Path) -> str:
    """What the adapter's config calls its base model: a folder or a hub id. Raises UserError as adapter_fields does."""
    raw = adapter_fields(folder)
    name = raw.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise raw.bad("base_model_name_or_path", "the name of the base model")
    return name


def scale_of(folder: Path) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
    raw = adapter_fields(folder)
    rank, alpha = raw.positive("r"), raw.positive("lora_alpha", float)
    return alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def merge_adapter(base: Path, adapter: Path, output: Path) -> None:
    """Write base's checkpoint with the adapter merged into folder output, in base's dtypes.

    Raises UserError for a base that is quantized or rotated, and for adapter tensors that fit none of its weights.
    """
    if load_quantization(base) is not None:
        raise UserError(f"{base}: is quantized; an adapter is merged into the original weights")
    if rotation_record(base) is not None:
        raise UserError(f"{base}: is rotated; merge the adapter into the original model, then rotate that")
    pairs, scale, shards = _pairs(adapter), scale_of(adapter), find_shards(base)
    _check_fit(base, adapter, shards, pairs)
    print(f"merging {adapter} into {base} (once)", file=sys.stderr)
    index: dict[str, str] = {}
    for shard in progress(shards, "merging the adapter", "shard"):
        with open_file(shard) as file:
            stored = Shard(file, shard, NO_FORMS)
            tensors = {name: stored.stored(name) for name in stored.keys()}  # noqa: SIM118 - no dict
            for name in sorted(tensors.keys() & pairs.keys()):
                (a, b), weight = pairs[name], stored.get_tensor(name)
                tensors[name] = (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
        save_shard(tensors, output / shard.name)
        index |= dict.fromkeys(tensors, shard.name)
    copy_other_files(base, output, "teal-*.json")
    if (base / INDEX).exists():
        write_index(output, index, sum((output / shard.name).stat().st_size for shard in shards))
    for path in adapter.glob("*token*"):  # its own words for roles, and its chat template
        if path.is_file():
            shutil.copyfile(path, output / path.name)


def _check_fit(base: Path, adapter: Path, shards: list[Path], pairs: dict[str, list[Tensor]]) -> None:
    """Raise UserError unless each pair is of a weight in these files, of its shape, in floats. Reads no weight."""
    unknown = set(pairs)
    for shard in shards:
        with open_file(shard) as file:
            stored = Shard(file, shard, NO_FORMS)
            for name in sorted(unknown.intersection(stored.keys())):
                unknown.remove(name)
                (a, b), weight = pairs[name], stored.get_slice(name)
                if a.shape[0] != b.shape[1] or [b.shape[0], a.shape[1]] != weight.get_shape():
                    shapes = f"{list(b.shape)} times {list(a.shape)} does not fit {weight.get_shape()}"
                    raise UserError(f"{adapter / WEIGHTS}: {name} of {shapes} of {base}")
                if weight.get_dtype() not in READABLE_DTYPES:
                    raise UserError(
                        f"{adapter / WEIGHTS}: {name} of {base} is {weight.get_dtype()}; "
                        f"expected one of {', '.join(READABLE_DTYPES)}"
                    )
    if unknown:
        raise UserError(f"{adapter / WEIGHTS}: {min(unknown)} is no weight of {base} ({len(unknown)} unknown in all)")


def _pairs(folder: Path) -> dict[str, list[Tensor]]:
    """A [r, K] and B [N, r], by the name of the base model's weight [N, K]."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; an adapter folder must hold it, pickles are not read")
    found: dict[str, list[Tensor]] = {}
    with open_file(path) as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no dict
            part = next((part for part in PARTS if key.endswith(part)), None)
            if part is None or not key.startswith(PREFIX):
                raise UserError(f"{path}: {key} is not supported; expected lora_A and lora_B of linear layers")
            name = key.removeprefix(PREFIX).removesuffix(part) + ".weight"
            found.setdefault(name, [torch.empty(0), torch.empty(0)])[PARTS[part]] = file.get_tensor(key)
    for name, pair in found.items():
        if not all(t.dim() == 2 and bool(t.isfinite().all()) for t in pair):
            raise UserError(f"{path}: {name} lacks lora_A or lora_B, or holds NaN or infinity; download it again")
    return found
