"""Zero points of GPTQ's two layouts, against a dequantization in fp32 written from the formats' definition."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from teal.checkpoint.awq_gptq import Packing
from teal.checkpoint.weights import load_model, weight_targets
from teal.errors import UserError
from teal.layers.quantized_linear import QuantizedLinear
from tests.conftest import QUANTIZABLE, save_tiny_model, tiny_config

CPU = torch.device("cpu")
GROUP = 16
V1, V2 = {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}


def words(integers: np.ndarray, bits: int) -> torch.Tensor:
    """uint [R, C] -> int32 [R, C * bits/32]: the first of a word's integers in its lowest bits."""
    shifts = bits * np.arange(32 // bits, dtype=np.uint64)
    places = integers.reshape(len(integers), -1, 32 // bits).astype(np.uint64) << shifts
    return torch.from_numpy(places.sum(-1).astype(np.uint32).view(np.int32))


def defined_weight(q: np.ndarray, stored: np.ndarray, scales: np.ndarray, bits: int, less: int) -> np.ndarray:
    """fp32 [N, K] of integers [K, N]: scale (q - zero), zero being stored + less in arithmetic of bits bits."""
    weight = np.empty(q.shape[::-1], np.float32)
    for k in range(q.shape[0]):
        for n in range(q.shape[1]):
            zero = (int(stored[k // GROUP, n]) + less) % (1 << bits)
            weight[n, k] = np.float32(scales[k // GROUP, n]) * np.float32(int(q[k, n]) - zero)
    return weight


def write(
    folder: Path, config: dict[str, Any], stored: int | None, less: int, sizes: dict[str, int]
) -> dict[str, torch.Tensor]:
    """A GPTQ checkpoint with random integers and zero points, or all as given: the weights it defines, by name."""
    bits = config["bits"]
    save_tiny_model(tiny_config("qwen2", **sizes, num_hidden_layers=1), folder)
    rng = np.random.default_rng(0)
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        N, K = tensors.pop(name).shape
        q = rng.integers(0, 1 << bits, (K, N), dtype=np.uint32)
        zeros = rng.integers(0, 1 << bits, (K // GROUP, N), dtype=np.uint32)
        zeros = zeros if stored is None else np.full_like(zeros, stored)
        scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
        prefix = name.removesuffix("weight")
        tensors[f"{prefix}qweight"] = words(q.T.copy(), bits).t().contiguous()
        tensors[f"{prefix}qzeros"] = words(zeros, bits)
        tensors[f"{prefix}scales"] = torch.from_numpy(scales)
        tensors[f"{prefix}g_idx"] = torch.arange(K, dtype=torch.int32) // GROUP
        expected[name] = torch.from_numpy(defined_weight(q, zeros, scales, bits, less))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(raw))
    return expected


def loaded_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The projections of a checkpoint as fp32 [N, K], by name."""
    model = load_model(folder, CPU, torch.float32)
    for module in [m for m in model.modules() if any(isinstance(child, QuantizedLinear) for child in m.children())]:
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                linear = torch.nn.Linear(1, 1, bias=child.bias is not None)
                linear.weight = torch.nn.Parameter(child.dequantized().t().contiguous())
                linear.bias = child.bias
                setattr(module, name, linear)
    return {name: tensor for name, tensor in weight_targets(model).items() if name.endswith("_proj.weight")}


# Layout in the config, what every zero point is stored as (None: at random), and what is added to it.
ASYMMETRIC = {"sym": False}
CASES: dict[str, tuple[int, dict[str, Any], int | None, int]] = {
    "v1": (4, V1 | ASYMMETRIC, None, 1),
    "v2": (4, V2 | ASYMMETRIC, None, 0),
    "no layout named": (4, ASYMMETRIC, None, 1),
    "v2 by its other key": (4, ASYMMETRIC | {"format": "gptq_v2"}, None, 0),
    "v1, 15 is 0": (4, V1 | ASYMMETRIC, 15, 1),
    "symmetric v1": (4, V1 | {"sym": True}, 7, 1),
    "symmetric v2": (4, V2 | {"sym": True}, 8, 0),
    "symmetric, 15 is 0": (4, V1 | {"sym": True}, 15, 1),
    "symmetric v2 that says v1": (4, V1 | {"sym": True}, 8, 0),
    "v1, 8 bits": (8, V1 | ASYMMETRIC, None, 1),
    "v2, 8 bits": (8, V2 | ASYMMETRIC, None, 0),
    "symmetric v1, 8 bits": (8, V1 | {"sym": True}, 127, 1),
    "symmetric v2 that says v1, 8 bits": (8, V1 | {"sym": True}, 128, 0),
    "v1, 255 is 0": (8, V1 | ASYMMETRIC, 255, 1),
}


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 48, "intermediate_size": 96}, QUANTIZABLE], ids=["as floats", "as integers"]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_weights_are_those_the_layout_defines(
    case: tuple[int, dict[str, Any], int | None, int], sizes: dict[str, int], tmp_path: Path
) -> None:
    bits, layout, stored, less = case
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, **layout}
    expected = write(tmp_path, config, stored, less, sizes)
    found = loaded_weights(tmp_path)
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize(
    "change,named",
    [
        ({"version": "gemv"}, "awq layout 'gemv'"),
        ({"version": "GEMV_FAST"}, "awq layout 'gemv_fast'"),
        ({"format": "gemv"}, "awq layout 'gemv'"),
        ({"version": "gemm", "backend": "llm-awq"}, "awq layout 'llm-awq'"),
        ({"zero_point": False}, "awq without zero points"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq layout 'marlin'"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "gptq layout 'marlin'"),
        ({"quant_method": "gptq", "format": "bitblas"}, "gptq layout 'bitblas'"),
    ],
)
def test_other_layouts_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"config.json: {re.escape(named)}.* is not supported; expected"):
        Packing.from_json({"quant_method": "awq", "bits": 4, "group_size": 128} | change, "config.json")


@pytest.mark.parametrize("group", [-1, 3])
def test_a_group_that_is_not_there_is_named(group: int, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, **V1}
    write(tmp_path, config, 7, 1, {"hidden_size": 48, "intermediate_size": 96})
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.g_idx"][5] = group
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"model\.safetensors: model\.layers\.0\.self_attn\.o_proj: g_idx .*{group}"):
        load_model(tmp_path, CPU, torch.float32)
