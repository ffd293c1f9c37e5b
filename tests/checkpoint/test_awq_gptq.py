"""AWQ and GPTQ checkpoints: in their own integers where a kernel takes them, else as the floats they stand for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.calibration.thresholds import calibrate_quickly
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.layers.phase import decoding
from teal.layers.quantized_linear import QuantizedLinear, is_quantized
from teal.model import Transformer
from teal.options import Settings
from teal.teal_layers import achieved_sparsity, set_counting, sparsify
from tests.conftest import QUANTIZABLE, assert_near, save_tiny_model, tiny_config

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
SYMMETRIC = {"bits": 8, "sym": True}
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
    if config.get("sym"):
        zeros.fill_(1 << bits - 1)
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


def write(folder: Path, config: dict[str, Any], **sizes: int) -> tuple[Path, Path]:
    """(checkpoint packed as config says, the same model in floats)."""
    odd = {"hidden_size": 48, "intermediate_size": 96}  # key and value widths that do not fit the packed layout
    tiny = tiny_config("qwen2", **(odd | sizes), num_hidden_layers=2)
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
def logits(model: Transformer, one_by_one: bool = False) -> Tensor:
    positions = torch.arange(9, device=model.embedding.weight.device)[None]
    ids = positions + 3
    cache = model.new_cache(1, 16)
    if not one_by_one:
        return model(ids, positions, cache).float()
    with decoding(model):
        calls = zip(ids.split(1, 1), positions.split(1, 1), strict=True)
        return torch.cat([model(tokens, at, cache) for tokens, at in calls], dim=1).float()


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
        f"{c['quant_method']}{c['bits']}{'-act' * bool(c.get('desc_act'))}"
        f"{c.get('checkpoint_format', '')}{c['group_size']}"
    ),
)
def test_logits_are_those_of_the_dequantized_weights(config: dict[str, Any], tmp_path: Path) -> None:
    packed, floats = write(tmp_path, config)
    assert torch.equal(logits(load_model(packed, CPU, torch.float32)), logits(load_model(floats, CPU, torch.float32)))


@pytest.mark.parametrize(
    "config", [AWQ, AWQ | {"group_size": -1}, GPTQ, GPTQ | {"checkpoint_format": "gptq_v2"}, GPTQ | SYMMETRIC]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_integers_are_kept(device: torch.device, config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    packed, floats = write(tmp_path, config, **QUANTIZABLE)
    kept, twin = load_model(packed, device, dtype), load_model(floats, device, dtype)
    assert is_quantized(kept) and not is_quantized(twin)
    modules = dict(kept.named_modules())
    for name, linear in twin.layers.named_modules(prefix="layers"):
        if isinstance(linear, torch.nn.Linear):
            module = modules[name]
            assert isinstance(module, QuantizedLinear) and module.bits == config["bits"]
            # In bf16 the scales are rounded in one model, and the weights in the other.
            assert_near(
                f"{name}.weight", module.dequantized().t(), linear.weight, 0 if dtype == torch.float32 else 4e-3
            )
    assert_near("logits", logits(kept), logits(twin), 1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize(
    "config", [GPTQ | {"desc_act": True}, GPTQ | {"bits": 8}], ids=["act-order", "8 bits, asymmetric"]
)
def test_what_the_kernels_do_not_take_becomes_floats(config: dict[str, Any], tmp_path: Path) -> None:
    packed, floats = write(tmp_path, config, **QUANTIZABLE)
    model = load_model(packed, CPU, torch.float32)
    assert not is_quantized(model)
    assert torch.equal(logits(model), logits(load_model(floats, CPU, torch.float32)))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_sparse_decoding_of_kept_integers(device: torch.device, tmp_path: Path) -> None:
    """Calibrated, sparse and token by token, as the model of floats with the same thresholds."""
    packed, floats = write(tmp_path, AWQ, **QUANTIZABLE)
    kept, twin = load_model(packed, device, torch.float32), load_model(floats, device, torch.float32)
    text = "".join(chr(97 + i % 23) for i in range(24000))
    plan = calibrate_quickly(kept, lambda t: [ord(c) % 199 for c in t], Settings((0.4,)), text)
    for model in (kept, twin):
        sparsify(model, plan)
        set_counting(model, True)
    found, expected = (logits(model, one_by_one=True) for model in (kept, twin))
    assert_near("logits", found, expected, 1e-5)
    [shares, others] = [[s for layer in achieved_sparsity(m) for s in layer.values()] for m in (kept, twin)]
    assert shares == others and 0.1 < sum(shares) / len(shares) < 0.7


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
