"""GGUF file -> an ordinary Hugging Face folder: config, safetensors, tokenizer.

The `gguf` package reads and dequantizes the tensors. This module only renames them, and undoes what llama.cpp's
converter did to them: for some families it permutes the rows of q and k, whose channels rotate in pairs. Values are
stored as F16, the precision of the scales in every quantized GGUF type, except where the source itself is BF16 or F32.
Q4_0 and Q8_0 are integers (less 8) with a scale for 32 input channels. If all projections are of one of them, they stay
so: in the layouts of AWQ and GPTQ.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor, dequantize
from safetensors.torch import save_file

from teal.checkpoint.awq_gptq import as_awq, as_gptq
from teal.checkpoint.gguf_config import Metadata, hf_config, hf_name, is_projection
from teal.checkpoint.gguf_families import PROJECTION_NAMES
from teal.checkpoint.gguf_header import check_architecture
from teal.checkpoint.gguf_parts import read_parts
from teal.checkpoint.gguf_tokenizer import write_tokenizer
from teal.checkpoint.weights import is_finite
from teal.errors import UserError
from teal.files import write_json
from teal.progress import progress

READABLE_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
# Types whose integers stay, if all projections have one of them: the quantization_config of the layout they get.
KEPT: dict[GGMLQuantizationType, dict[str, Any]] = {
    GGMLQuantizationType.Q4_0: {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    GGMLQuantizationType.Q8_0: {
        "quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq_v2",
    },
}  # fmt: skip
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
    kinds = {tensor.tensor_type for tensor in tensors if hf_name(meta, tensor.name) and is_projection(tensor)}
    if len(kinds) == 1 and (kind := kinds.pop()) in KEPT:
        config["quantization_config"] = KEPT[kind]
    write_json(folder / "config.json", config)
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": meta.end_ids()}
    write_json(folder / "generation_config.json", ends)
    write_tokenizer(meta, folder)
    _write_weights(meta, tensors, config, folder)


def _tensors(
    meta: Metadata, tensors: list[ReaderTensor], config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """(HF name, CPU tensor) for each tensor of the file, one at a time. Raises UserError if one is not finite."""
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}  # whose channels rotate
    counts = {PROJECTION_NAMES[name]: count for name, count in heads.items() if meta.family.pairs_rows}
    for tensor in progress(tensors, "converting GGUF", "tensor"):
        name = hf_name(meta, tensor.name)
        if name is None:
            continue
        count = counts.get(tensor.name.split(".")[-2])
        if "quantization_config" in config and is_projection(tensor):
            values, scales = (_in_order(part, count).t() for part in _integers(tensor.data, tensor.tensor_type))
            if not is_finite(scales):
                raise _not_finite(meta.path, tensor)
            parts = (
                as_gptq(values, scales) if tensor.tensor_type == GGMLQuantizationType.Q8_0 else as_awq(values, scales)
            )
            yield from ((name.removesuffix("weight") + part, packed.contiguous()) for part, packed in parts.items())
            continue
        data = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements=["C", "W"]))
        if not is_finite(data):
            raise _not_finite(meta.path, tensor)
        kept = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}
        stored = data.to(kept.get(tensor.tensor_type, torch.float16))
        stored = stored if is_finite(stored) else data  # beyond fp16: scales of K-quants are products
        yield name, _in_order(stored, count).contiguous()


def _not_finite(path: Path, tensor: ReaderTensor) -> UserError:
    return UserError(f"{path}: tensor {tensor.name} holds NaN or infinity; the file is damaged, download it again")


def _in_order(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows (head, pair, half) of q and k -> (head, half, pair); others, of no heads, as they are."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _integers(data: np.ndarray, kind: GGMLQuantizationType) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [N, K], int8 of Q8_0 and uint8 of Q4_0, and scales fp16 [N, K/32] of a tensor's rows of blocks."""
    size = 34 if kind == GGMLQuantizationType.Q8_0 else 18  # bytes, two of the scale before the integers
    blocks = torch.from_numpy(np.require(data, requirements=["C", "W"])).unflatten(1, (-1, size))
    scales, integers = blocks[:, :, :2].contiguous().view(torch.float16)[:, :, 0], blocks[:, :, 2:]
    if kind == GGMLQuantizationType.Q8_0:
        return integers.contiguous().view(torch.int8).flatten(1), scales
    return torch.cat((integers & 15, integers >> 4), dim=2).flatten(1), scales


def _write_weights(meta: Metadata, tensors: list[ReaderTensor], config: dict[str, Any], folder: Path) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, data in _tensors(meta, tensors, config):
        if pending and sum(t.nbytes for t in pending.values()) + data.nbytes > SHARD_BYTES:
            flush()
        pending[name] = data
        total += data.nbytes
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
