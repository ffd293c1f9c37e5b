"""GGUF file -> a folder as Hugging Face has them: config, safetensors, tokenizer.

The `gguf` package reads the tensors. This module renames them, and undoes what llama.cpp's converter did. For some
families it permutes the rows of q and k, whose channels rotate in pairs. To Gemma's norms it adds 1. Integers and
scales of quantized types stay as they are, in a layout of our own (blocks.py). A tensor that reaches beyond fp16
becomes fp32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor, dequantize

from teal.checkpoint.blocks import fits_half, save_shard
from teal.checkpoint.gguf_config import Metadata, hf_config, hf_name
from teal.checkpoint.gguf_families import PROJECTION_NAMES
from teal.checkpoint.gguf_header import check_architecture
from teal.checkpoint.gguf_parts import read_parts
from teal.checkpoint.gguf_tokenizer import write_tokenizer
from teal.checkpoint.weights import is_finite
from teal.errors import UserError
from teal.files import write_json
from teal.kernels.formats.blocks import BLOCK_TYPES, Blocks, pack
from teal.progress import progress

READABLE_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
SHARD_BYTES = 2 << 30  # bounds host memory: one shard is held while it is written


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in the GGUF file at path, which may be one part of several, as a Hugging Face folder.

    folder is empty before. Raises UserError if the file is unreadable, of another architecture, or holds an unsupported
    type or a NaN, or if a part is missing.
    """
    entries, tensors = read_parts(path)
    check_architecture(path, entries.get("general.architecture"))
    meta = Metadata(path, entries)
    for tensor in tensors:
        if tensor.tensor_type not in READABLE_TYPES:
            raise UserError(
                f"{path}: tensor {tensor.name} has GGUF type {tensor.tensor_type.name}; "
                f"supported are {', '.join(sorted(t.name for t in READABLE_TYPES))}"
            )
    config = hf_config(meta, tensors)
    write_json(folder / "config.json", config)
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": meta.end_ids()}
    write_json(folder / "generation_config.json", ends)
    write_tokenizer(meta, folder)
    _write_weights(meta, tensors, config, folder)


def _tensors(
    meta: Metadata, tensors: list[ReaderTensor], config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor | Blocks]]:  # fmt: skip
    """(HF name, CPU tensor or weight in blocks) for each tensor of the file, one at a time.

    Raises UserError if one is not finite.
    """
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}  # whose channels rotate
    counts = {PROJECTION_NAMES[name]: count for name, count in heads.items() if meta.family.pairs_rows}
    for tensor in progress(tensors, "converting GGUF", "tensor"):
        name = hf_name(meta, tensor.name)
        if name is None:
            continue
        count = counts.get(tensor.name.split(".")[-2])
        if (kind := tensor.tensor_type.name) in BLOCK_TYPES:
            rows = torch.from_numpy(np.require(tensor.data, requirements=["C", "W"]))
            weight = pack(kind, _in_order(rows, count))
            if fits_half(weight):
                yield name, weight
                continue
        data = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements=["C", "W"]))
        if not is_finite(data):
            raise _not_finite(meta.path, tensor)
        if meta.family.norm_offset and name.endswith("norm.weight"):
            data = data - meta.family.norm_offset
        kept = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}
        stored = data.to(kept.get(tensor.tensor_type, torch.float16))
        stored = stored if is_finite(stored) else data  # beyond fp16: scales of K-quants are products
        yield name, _in_order(stored, count).contiguous()


def _not_finite(path: Path, tensor: ReaderTensor) -> UserError:
    return UserError(f"{path}: tensor {tensor.name} holds NaN or infinity; the file is damaged, download it again")


def _in_order(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows (head, pair, half) of q and k -> (head, half, pair); others, of no heads, as they are."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write_weights(meta: Metadata, tensors: list[ReaderTensor], config: dict[str, Any], folder: Path) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor | Blocks] = {}
    total = waiting = 0  # bytes

    def flush() -> None:
        save_shard(pending, folder / f"shard-{len(shards)}.safetensors")
        shards.append(list(pending))
        pending.clear()

    for name, data in _tensors(meta, tensors, config):
        size = (data.data if isinstance(data, Blocks) else data).nbytes
        if pending and waiting + size > SHARD_BYTES:
            flush()
            waiting = 0
        pending[name] = data
        total, waiting = total + size, waiting + size
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"shard-{i}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
