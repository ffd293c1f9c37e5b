"""Products with refined channels, on every path, against plain arithmetic; Triton is interpreted on a CPU."""

import math

import pytest
import torch
from torch import Tensor

from teal.kernels import dequantize as dequantize_file
from teal.kernels import quantized_matmul as quantized_matmul_file
from teal.kernels import sparse_gemv as sparse_gemv_file
from teal.kernels import sparse_linear as sparse_linear_file
from teal.kernels.activation_gemv import activation_gemv
from teal.kernels.attention_gemv import attention_gemv
from teal.kernels.formats.packing import Weight, check_refined, dequantize, pack_int4
from teal.kernels.gemv import launch
from teal.kernels.gemv.tuning import GemvTile
from teal.kernels.norm_gemv import norm_gemv
from teal.kernels.quantized_matmul import floats, quantized_matmul
from teal.kernels.reference import rms_norm_reference, silu_reference, sparse_linear_reference
from teal.kernels.sparse_gemv import sparse_gemv
from teal.kernels.sparse_linear import sparse_linear, sparse_linear_op
from teal.options import MAX_ROWS
from tests import lanes
from tests.conftest import assert_near
from tests.products import DEVICE, DTYPES

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
CPU = torch.device("cpu")
EPS = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 4e-4}  # of weights or results rounded to the dtype
K = 97  # channels
REFINED = {
    "none": [],
    "one": [K - 1],
    "prefix": list(range(16)),
    "scattered": [0, 3, *range(15, 23), 40, 41, 64, 80, 90, 96],
    "all": list(range(K)),
}
Mixed = tuple[Tensor, Tensor, Tensor, Tensor]  # values, scales, zeros, refined
by_refined = pytest.mark.parametrize("refined", REFINED)


def mixed(refined: str, N: int, group: int, dtype: torch.dtype, device: torch.device) -> tuple[Mixed, Tensor]:
    """A weight [K, N] whose second rows are as large as its first, and what it stands for in fp32."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.tensor(REFINED[refined], dtype=torch.int32)
    rows, groups = K + len(channels), N // group
    integers = torch.randint(0, 16, (rows, N), generator=generator)
    scales = (0.01 + 0.02 * torch.rand(rows, groups, generator=generator)).to(dtype)
    zeros = torch.randint(0, 16, (rows, groups), generator=generator)
    parts = (integers - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)
    exact = parts[:K].clone()
    for j, channel in enumerate(channels.tolist()):
        exact[channel] += parts[K + j]
    packed = pack_int4(integers, group).to(device)
    return (packed, scales.to(device), zeros.to(device, torch.uint8), channels.to(device)), exact.to(device)


def entries(B: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(B, K, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@by_refined
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_channel_is_the_sum_of_its_rows(refined: str, group: int, dtype: torch.dtype) -> None:
    """In plain PyTorch, in C++ and in Triton: the same bits, also of some columns."""
    weight, exact = mixed(refined, 384, group, dtype, CPU)
    whole, out = Weight(*weight), torch.empty(K, 256, dtype=dtype)
    assert whole.K == K and torch.equal(dequantize(*weight), exact.to(dtype))
    assert torch.equal(floats(whole), exact.to(dtype))
    assert floats(whole.columns(128, 384), out) is out and torch.equal(out, exact[:, 128:].to(dtype))
    weight, exact = mixed(refined, 384, group, dtype, DEVICE)
    assert torch.equal(dequantize_file.launch(*weight), exact.to(dtype))
    part = Weight(*weight).columns(128, 384)
    assert part.scales is not None
    assert torch.equal(dequantize_file.launch(part.values, part.scales, *part[2:]), exact[:, 128:].to(dtype))


@by_refined
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "none"])
@pytest.mark.parametrize("B", [1, 2, 8, 9])
def test_products_on_a_cpu(
    B: int, compiler: bool, refined: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiler:
        for file in (sparse_linear_file, quantized_matmul_file):
            monkeypatch.setattr(file, "native_kernels", lambda: None)
    weight, exact = mixed(refined, 1152, 64, dtype, CPU)
    x, limits, segments = entries(B, dtype, CPU), torch.tensor([0.3, 0.9, 0.0]), [640, 384, 128]
    found = sparse_linear(x, weight[0], limits, segments, *weight[1:])
    tolerance = EPS[dtype] * (1 if compiler and B <= MAX_ROWS else 2)  # otherwise weights are rounded, too
    assert_near("sparse product", found, sparse_linear_reference(x, exact, limits, segments), tolerance)
    assert found.dtype == dtype
    monkeypatch.setattr("teal.kernels.quantized_matmul.COLUMNS_AT_ONCE", 512)
    assert_near("dense product", quantized_matmul(x, *weight), x.float() @ exact, 2 * EPS[dtype])
    wide = quantized_matmul(x, *weight, torch.float32)
    assert wide.dtype == torch.float32
    assert_near("dense product in fp32", wide, x.float() @ exact, 2e-6)


def test_a_row_has_the_bits_it_has_alone() -> None:
    weight, _ = mixed("scattered", 256, 64, torch.float32, CPU)
    x = entries(4, torch.float32, CPU)
    arguments = (weight[0], torch.tensor([0.5]), [256], *weight[1:])
    for row, expected in zip(x.split(1), sparse_linear(x, *arguments).split(1), strict=True):
        assert torch.equal(sparse_linear(row, *arguments), expected)


def test_a_compiled_product() -> None:
    weight, exact = mixed("scattered", 96, 32, torch.float32, CPU)
    x = entries(3, torch.float32, CPU)
    product = torch.compile(quantized_matmul, fullgraph=True, backend="aot_eager")  # test_input_groups.py: inductor
    assert_near("compiled product", product(x[None], *weight), x[None] @ exact, 1e-6)


@by_refined
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "B,segments,group", [(1, [96], 32), (1, [128, 128, 128], 128), (3, [64, 128], 64), (8, [96], 32)]
)
def test_the_triton_sums(B: int, segments: list[int], group: int, refined: str, dtype: torch.dtype) -> None:
    weight, exact = mixed(refined, sum(segments), group, dtype, DEVICE)
    x, limits = entries(B, dtype, DEVICE), torch.linspace(0.0, 0.9, len(segments)).to(DEVICE)
    expected = sparse_linear_reference(x, exact, limits, segments)
    tolerance = 1e-5 if B == 1 else 2 * EPS[dtype]  # weights of several rows are rounded to the dtype
    arguments = (x, weight[0], limits, segments, *weight[1:])
    assert_near("rule's tile", sparse_gemv(*arguments).sum(0), expected, tolerance)
    tile = GemvTile(group, 2, 8, 3, 1)
    assert_near(f"{tile}", sparse_gemv_file.launch(*arguments, tile).sum(0), expected, tolerance)


@by_refined
@pytest.mark.parametrize(
    "B,segments,group,dtype",
    [
        (1, [256, 128], 128, torch.bfloat16),
        (1, [320, 64], 64, torch.float16),
        (3, [256, 128], 128, torch.bfloat16),
        (8, [320, 64], 64, torch.bfloat16),
    ],
    ids=str,
)
def test_the_sums_on_tensor_cores(
    B: int, segments: list[int], group: int, refined: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes.emulate(monkeypatch)
    weight, exact = mixed(refined, sum(segments), group, dtype, DEVICE)
    x, limits, tile = entries(B, dtype, DEVICE), torch.tensor([0.3, 0.9], device=DEVICE), GemvTile(512, 4, 4, 3, 2)
    meta = launch.plan_gemv(Weight(*weight), limits, segments, B, tile).meta
    assert meta.TENSOR_CORE and meta.REFINED
    found = sparse_gemv_file.launch(x, weight[0], limits, segments, *weight[1:], tile).sum(0)
    expected = sparse_linear_reference(x, exact, limits, segments)
    for row in range(B):
        assert_near(f"row {row}", found[row], expected[row], 1e-5 if B == 1 else 2 * EPS[dtype])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("channel", [K - 1, K // 2])
@pytest.mark.parametrize("B", [1, 3])
def test_nan_and_infinity_stay_in_their_row(B: int, channel: int, value: float) -> None:
    """Of a refined channel and of another; on the CPU's path and in Triton."""
    for device in (CPU, DEVICE):
        weight, _ = mixed("one", 96, 32, torch.float32, device)
        x, limits = entries(B, torch.float32, device), torch.tensor([0.4], device=device)
        x[B - 1, channel] = value
        arguments = (x, weight[0], limits, [96], *weight[1:])
        for y in (sparse_linear(*arguments), sparse_gemv(*arguments).sum(0)):
            assert not y[B - 1].isfinite().any() and y[: B - 1].isfinite().all()


def test_both_rows_of_a_dropped_channel_are_never_read() -> None:
    for device in (CPU, DEVICE):
        weight, exact = mixed("scattered", 96, 32, torch.float32, device)
        x, limits = entries(1, torch.float32, device), torch.tensor([0.7], device=device)
        expected = sparse_linear_reference(x, exact, limits, [96])
        values, scales, _, refined = weight
        dropped = (x.abs() < limits)[0]
        assert 0 < int(dropped[refined].sum()) < len(refined)
        scales[torch.cat((dropped, dropped[refined]))] = math.nan
        assert_near("eager", sparse_linear(x, values, limits, [96], *weight[1:]), expected, 4e-6)
        assert_near("Triton", sparse_gemv(x, values, limits, [96], *weight[1:]).sum(0), expected, 4e-6)


@by_refined
@pytest.mark.parametrize("B", [1, 2])
def test_the_fused_products(B: int, refined: str) -> None:
    """x's norm is over its K entries: a second one of each refined channel would change it."""
    N, D = 96, 1  # K is a prime
    weight, exact = mixed(refined, N, 32, torch.float32, DEVICE)
    values, *rest = weight
    limits, norm = torch.tensor([0.6], device=DEVICE), torch.rand(K, device=DEVICE) + 0.5
    x = entries(B, torch.float32, DEVICE)
    found = norm_gemv(x, norm, 1e-5, values, limits, [N], *rest).sum(0)
    normed = rms_norm_reference(x, norm, 1e-5)
    assert_near("norm", found, sparse_linear_reference(normed, exact, limits, [N]), 1e-5)
    gate_up = torch.randn(3, B, 2 * K, device=DEVICE)
    hidden = silu_reference(*gate_up.sum(0).chunk(2, dim=-1))
    found = activation_gemv(gate_up, values, limits, *rest).sum(0)
    assert_near("silu", found, sparse_linear_reference(hidden, exact, limits, [N]), 1e-5)
    sums, one = x.view(B, K // D, 1, D), torch.ones(B, K // D, 1, device=DEVICE)
    found = attention_gemv(sums, 0 * one, one, values, limits, *rest).sum(0)
    assert_near("attention", found, sparse_linear_reference(x, exact, limits, [N]), 1e-5)


@pytest.mark.parametrize("B", [1, 2])
def test_opcheck(B: int) -> None:
    weight, _ = mixed("scattered", 96, 32, torch.float32, DEVICE)
    x, limits = entries(B, torch.float32, DEVICE), torch.tensor([0.6], device=DEVICE)
    values, *rest = weight
    torch.library.opcheck(sparse_linear_op, (x, values, limits, [96], *rest))
    torch.library.opcheck(sparse_gemv, (x, values, limits, [96], *rest))
    torch.library.opcheck(norm_gemv, (x, torch.ones(K, device=DEVICE), 1e-5, values, limits, [96], *rest))
    torch.library.opcheck(activation_gemv, (torch.randn(2, B, 2 * K, device=DEVICE), values, limits, *rest))
    one = torch.ones(B, K, 1, device=DEVICE)
    torch.library.opcheck(attention_gemv, (torch.randn(B, K, 1, 1, device=DEVICE), 0 * one, one, values, limits, *rest))


def test_other_weights_compile_as_if_no_channel_were_refined() -> None:
    limits, (weight, _) = torch.zeros(1, device=DEVICE), mixed("none", 96, 32, torch.float32, DEVICE)
    for parts, expected in ((weight[:3], False), (weight, True)):
        assert expected == launch.plan_gemv(Weight(*parts), limits, [96], 1, None).meta.REFINED


def test_bad_refined_channels_are_refused() -> None:
    (values, scales, zeros, refined), _ = mixed("scattered", 96, 32, torch.float32, CPU)
    x, limits = entries(1, torch.float32, CPU), torch.zeros(1)
    bytes_, one = torch.zeros(len(values), 96, dtype=torch.int8), torch.ones(1, 96)
    bad: dict[str, tuple[Tensor | None, ...]] = {
        "refined is torch.int64 (16,): expected int32 [E]": (values, scales, zeros, refined.long()),
        "refined is torch.int32 (4, 4): expected int32 [E]": (values, scales, zeros, refined.view(4, 4)),
        "expected contiguous": (values, scales, zeros, refined.repeat_interleave(2)[::2]),
        "of 4 bits": (bytes_, scales, None, refined),
        "with groups along the output": (values, one, one.to(torch.uint8), refined),
        "refined channels: expected": (bytes_.float(), None, None, refined),
        "expected": (values, scales, zeros, refined[:9]),
    }
    for message, (weight, *rest) in bad.items():
        for product in (sparse_linear, sparse_gemv_file.launch):
            with pytest.raises(ValueError) as error:
                product(x, weight, limits, [96], *rest)  # type: ignore[arg-type]
            assert message in str(error.value), message


def test_channels_out_of_range_or_order_are_refused() -> None:
    weight, _ = mixed("scattered", 96, 32, torch.float32, CPU)
    for channels, message in (
        ([3, 3], "refined channel 3 follows 3: expected rising order"),
        ([0, 5, 4], "refined channel 4 follows 5"),
        ([-1, 5], "refined channels are -1 to 5: expected 0 to 96"),
        ([0, K], f"refined channels are 0 to {K}: expected 0 to {K - 1}"),
    ):
        with pytest.raises(ValueError, match=message):
            check_refined(torch.tensor(channels, dtype=torch.int32), K)
    for bad in (-1, K):
        weight[3][0] = bad
        with pytest.raises(ValueError, match=f"refined channel {bad}: expected 0 to {K - 1}"):
            sparse_linear(entries(1, torch.float32, CPU), weight[0], torch.zeros(1), [96], *weight[1:])
