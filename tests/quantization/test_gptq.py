"""GPTQ and half-quadratic fits beside rounding to nearest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.checkpoint.weights import load_model
from teal.cli import quantize
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import (
    QuantConfig,
    round_to_nearest,
)
from teal.model import KVCache
from teal.quantization.gptq import BlockwiseGptq, gptq, gptq_input_groups
from teal.quantization.half_quadratic import half_quadratic
from tests.conftest import (
    ROOT,
    relative_error,
)

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_changes_the_product_less_than_rounding(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)  # correlated channels
    x[:, 7] = 0  # a channel that no token uses
    weight = torch.randn(96, 128, generator=generator)
    nearest, better = (
        dequantize(*packed) for packed in (round_to_nearest(weight, bits, 32), gptq(weight, x.t() @ x, bits, 32))
    )
    assert relative_error(x @ better, x @ weight) <= 0.8 * relative_error(x @ nearest, x @ weight)
    assert relative_error(better[7], nearest[7]) <= 0.2


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_with_groups_along_the_input(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight = torch.randn(96, 128, generator=generator)
    nearest = dequantize(*round_to_nearest(weight.t().contiguous(), bits, 32)).t()
    better = dequantize(*gptq_input_groups(weight, x.t() @ x, bits, 32))
    assert relative_error(x @ better, x @ weight) <= 0.8 * relative_error(x @ nearest, x @ weight)
    of_independent_channels = dequantize(*gptq_input_groups(weight, torch.eye(96), bits, 32))
    assert torch.equal(of_independent_channels, nearest)  # rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_hqq_lowers_the_norm_it_is_for_in_every_group(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((24, 192)).to(dtype)
    weight[5, 64:128], weight[6, :64] = 0.0, torch.rand(64, generator=generator).to(dtype) + 3.0

    def norms(packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        exact = dequantize(packed[0], packed[1].float(), packed[2])
        return ((exact - weight.float()).abs() ** 0.7).view(24, 3, 64).sum(-1)

    found, rounded = norms(half_quadratic(weight, bits, 64)), norms(round_to_nearest(weight, bits, 64))
    assert (found <= rounded * (1 + 1e-6)).all() and found.sum() <= (0.98 if bits == 4 else 1.0) * rounded.sum()


def test_gptq_of_independent_channels_is_rounding() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(gptq(weight, torch.eye(64), 4, 32), round_to_nearest(weight, 4, 32), strict=True):
        assert found is not None and expected is not None and torch.equal(found, expected)


@pytest.mark.parametrize("grouping", ["output", "input"])
def test_gptq_folder(quantizable_folder: Path, tmp_path: Path, call_main: Command, grouping: str) -> None:
    """Nearer to the dense model than rounding on the text it saw, and the same after an interruption."""
    options = ("--sequences", "3", "--length", "100", "--text", ROOT / "README.md", "--grouping", grouping)
    for method in ("rtn", "hqq", "gptq"):
        arguments = (
            "--checkpoint",
            quantizable_folder,
            "--mode",
            "int4",
            "--method",
            method,
            *options,
            "-o",
            tmp_path / method,
        )
        code, _, err = call_main(quantize.main, *arguments)
        assert code == 0 and f"int4 by {method}" in err, err
    args = quantize.build_parser().parse_args(["--mode", "int4", *map(str, options), "-o", "x"])
    sequences = quantize.calibration_sequences(args, quantizable_folder, 400)
    positions = torch.arange(100)[None]

    def on_text(path: Path) -> torch.Tensor:
        model = load_model(path, torch.device("cpu"), torch.float32)
        cache = KVCache(model.config, 1, 100, torch.device("cpu"), torch.float32)
        with torch.inference_mode():
            return torch.cat([model(ids[None], positions, cache) for ids in sequences])

    dense = on_text(quantizable_folder)
    assert relative_error(on_text(tmp_path / "gptq"), dense) < 0.9 * relative_error(on_text(tmp_path / "rtn"), dense)

    original = BlockwiseGptq.layer

    def failing(self: BlockwiseGptq, i: int) -> Any:
        if i == 2:
            raise KeyboardInterrupt
        return original(self, i)

    again, how = tmp_path / "again", (QuantConfig("int4", 32, grouping=grouping), "gptq", sequences, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockwiseGptq, "layer", failing)
        with pytest.raises(KeyboardInterrupt):
            quantize.quantize_folder(quantizable_folder, again, *how)
    quantize.quantize_folder(quantizable_folder, again, *how)
    for path in (tmp_path / "gptq").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
