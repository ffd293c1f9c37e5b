"""AWQ and GPTQ checkpoints load as the floats they stand for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import load_model
from errors import UserError
from model import KVCache, Transformer
from tests.conftest import save_tiny_model, tiny_config

CPU = torch.device("cpu")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}


def pack(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Integers [R, C] -> words [R, C * bits/32], one loop for each place, as the writers of these formats do it."""
    words = torch.zeros(values.shape[0], values.shape[1] * bits // 32, dtype=torch.int64)
    for place, column in enumerate(order):
        words |= values[:, column :: len(order)].long() << bits * place
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def packed_linear(weight: Tensor, config: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """What a checkpoint holds for weight [N, K], and the weight that it stands for."""
    N, K = weight.shape
    bits, size = config["bits"], config["group_size"] if config["group_size"] > 0 else K
    index = torch.arange(K) // size
    if config.get("desc_act"):
        index = index[torch.randperm(K, generator=torch.Generator().manual_seed(1))]
    groups = int(index.max()) + 1
    generator = torch.Generator().manual_seed(0)
    scales = (0.02 + 0.02 * torch.rand(groups, N, generator=generator)).half()
    zeros = torch.randint(1, 1 << bits, (groups, N), generator=generator)
    values = (weight.t() / scales.float()[index] + zeros[index]).round().clamp(0, (1 << bits) - 1).int()
    exact = ((values - zeros[index]) * scales.float()[index]).t()
    if config["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {"qweight": pack(values, 4, order), "qzeros": pack(zeros, 4, order), "scales": scales}, exact
    in_order = tuple(range(32 // bits))
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    parts = {
        "qweight": pack(values.t(), bits, in_order).t(),
        "qzeros": pack(zeros - less, bits, in_order),
        "scales": scales,
    }
    return {name: part.contiguous() for name, part in parts.items()} | {"g_idx": index.int()}, exact


def write(folder: Path, config: dict[str, Any]) -> tuple[Path, Path]:
    """(checkpoint packed as config says, the same model in floats)."""
    tiny = tiny_config("qwen2", hidden_size=48, intermediate_size=96, num_hidden_layers=2)
    save_tiny_model(tiny, folder / "floats")
    shutil.copytree(folder / "floats", folder / "packed")
    tensors = load_file(folder / "floats" / "model.safetensors")
    packed = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            parts, tensors[name] = packed_linear(weight, config)
            del packed[name]
            packed |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, folder / "floats" / "model.safetensors", {"format": "pt"}
    )
    save_file(packed, folder / "packed" / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "packed" / "config.json").read_text())
    (folder / "packed" / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return folder / "packed", folder / "floats"


@torch.inference_mode()
def logits(model: Transformer) -> Tensor:
    ids = torch.arange(9)[None] + 3
    return model(ids, torch.arange(9)[None], KVCache(model.config, 1, 16, CPU, torch.float32))


@pytest.mark.parametrize(
    "config",
    [
        AWQ,
        AWQ | {"group_size": -1},
        GPTQ,
        GPTQ | {"bits": 8},
        GPTQ | {"desc_act": True},
        GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1},
    ],
    ids=lambda c: (
        f"{c['quant_method']}{c['bits']}{'-act' * bool(c.get('desc_act'))}{c.get('checkpoint_format', '')}{c['group_size']}"
    ),
)
def test_logits_are_those_of_the_dequantized_weights(config: dict[str, Any], tmp_path: Path) -> None:
    packed, floats = write(tmp_path, config)
    assert torch.equal(logits(load_model(packed, CPU, torch.float32)), logits(load_model(floats, CPU, torch.float32)))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"bits": 3}, "awq with bits 3 is not supported; expected 4"),
        ({"version": "gemv"}, "awq layout 'gemv' is not supported; expected gemm"),
        ({"group_size": 0}, "awq group_size 0 is not usable"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; expected teal, awq or gptq"),
        ({"group_size": 24}, "config.json says it should be"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    packed, _ = write(tmp_path, AWQ)
    raw = json.loads((packed / "config.json").read_text())
    raw["quantization_config"] |= change
    (packed / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load_model(packed, CPU, torch.float32)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, GPTQ)
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.g_idx"]
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing tensor model\.layers\.1\.mlp\.up_proj\.g_idx"):
        load_model(packed, CPU, torch.float32)
