"""LoRA adapter folders (Hu et al. 2021, arXiv 2106.09685): the base model with W + scale * B A in the place of W.

Merged once, a file at a time, into a folder that is a plain checkpoint of the base model's family.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teal.checkpoint.config import load_quantization, read_json
from teal.checkpoint.fields import Fields
from teal.checkpoint.weights import INDEX, copy_other_files, find_shards, write_index
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
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def base_name(folder: Path) -> str:
    """What the adapter's config calls its base model: a folder or a hub id. Raises UserError if it cannot be merged."""
    raw = Fields(folder / CONFIG, read_json(folder / CONFIG))
    for field, neutral in NEUTRAL.items():
        if raw.raw.get(field) not in neutral:
            raise UserError(
                f"{raw.path}: {field} {raw.raw.get(field)!r:.200} is not supported; expected {neutral[0]!r}"
            )  # fmt: skip
    name = raw.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise raw.bad("base_model_name_or_path", "the name of the base model")
    return name


def scale_of(folder: Path) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732)."""
    raw = Fields(folder / CONFIG, read_json(folder / CONFIG))
    rank, alpha = raw.positive("r"), raw.positive("lora_alpha", float)
    return alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def merge_adapter(base: Path, adapter: Path, output: Path) -> None:
    """Write base's checkpoint with the adapter merged into folder output, in base's dtypes.

    Raises UserError for a quantized base, and for adapter tensors that fit none of its weights.
    """
    if load_quantization(base) is not None:
        raise UserError(f"{base}: is quantized; an adapter is merged into the original weights")
    pairs, scale = _pairs(adapter), scale_of(adapter)
    shards, used = find_shards(base), set[str]()
    index: dict[str, str] = {}
    for shard in progress(shards, "merging the adapter", "shard"):
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
            metadata = file.metadata()
        for name in sorted(tensors.keys() & pairs.keys()):
            tensors[name] = _merged(adapter, name, tensors[name], pairs[name], scale)
            used.add(name)
        save_file(tensors, output / shard.name, metadata)
        index |= dict.fromkeys(tensors, shard.name)
    if unknown := sorted(pairs.keys() - used):
        raise UserError(f"{adapter / WEIGHTS}: {unknown[0]} is no weight of {base} ({len(unknown)} unknown in all)")
    copy_other_files(base, output, "teal-*.json")
    if (base / INDEX).exists():
        write_index(output, index, sum((output / shard.name).stat().st_size for shard in shards))
    for path in adapter.glob("*token*"):  # its own words for roles, and its chat template
        if path.is_file():
            shutil.copyfile(path, output / path.name)


def _merged(adapter: Path, name: str, weight: Tensor, pair: list[Tensor], scale: float) -> Tensor:
    a, b = pair
    if weight.dim() != 2 or (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
        shapes = [list(t.shape) for t in (b, a, weight)]
        raise UserError(f"{adapter / WEIGHTS}: {name} of {shapes[0]} times {shapes[1]} does not fit {shapes[2]}")
    if weight.dtype not in FLOATS:
        raise UserError(f"{adapter / WEIGHTS}: {name} of the base is {weight.dtype}; expected 16- or 32-bit floats")
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def _pairs(folder: Path) -> dict[str, list[Tensor]]:
    """A [r, K] and B [N, r], by the name of the base model's weight [N, K]."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; an adapter folder must hold it, pickles are not read")
    found: dict[str, list[Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no dict
                part = next((part for part in PARTS if key.endswith(part)), None)
                if part is None or not key.startswith(PREFIX):
                    raise UserError(f"{path}: {key} is not supported; expected lora_A and lora_B of linear layers")
                name = key.removeprefix(PREFIX).removesuffix(part) + ".weight"
                found.setdefault(name, [torch.empty(0), torch.empty(0)])[PARTS[part]] = file.get_tensor(key)
    except SafetensorError as error:
        raise UserError(f"{path}: truncated or corrupt safetensors file ({error}); download it again") from error
    for name, pair in found.items():
        if not all(t.dim() == 2 and bool(t.isfinite().all()) for t in pair):
            raise UserError(f"{path}: {name} lacks lora_A or lora_B, or holds NaN or infinity; download it again")
    return found
