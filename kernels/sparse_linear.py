"""x @ weight where small |x| count as zero, and the weight rows they would meet are never read.

Layout: weight is input-channel-major [K, N], so one dropped entry of x skips one contiguous row. For a
few rows of x the product is row_gather.cpp's on a CPU and sparse_gemv.py's on CUDA; for more, x is masked and
multiplied densely.
"""

import torch
from torch import Tensor

from kernels.packing import check_quantized, dequantize, packed_columns
from kernels.row_gather import native_row_gather

# With more rows of x nearly every weight row is kept by one of them, and a dense product is faster: 1536 x 3072
# bf16 at 50% on 2 Xeon cores (AVX-512), gather / dense: 2 rows 533 / 1247 us, 3 868 / 1607, 4 1043 / 1454.
MAX_GATHER_ROWS = 4
MAX_KERNEL_ROWS = 8  # on CUDA, likewise


@torch.library.custom_op("teal::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    segments: list[int],
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    """Each column segment of x @ weight, with entries |x| below the segment's threshold taken as 0.

    x [B, K] and weight [K, N] of one dtype (bf16, fp16 or fp32) and device, or weight, scales and zeros a quantized
    weight [K, N] (packing.py) whose scales have x's dtype; thresholds fp32 [J], or [J, K] for one on each channel,
    rounded to x's dtype before they are compared; segments: J widths that add up to N. Returns [B, N] in x's dtype.
    Raises ValueError on a mismatch.
    """
    _check(x, weight, thresholds, segments, scales, zeros)
    if x.is_cuda and x.shape[0] <= MAX_KERNEL_ROWS and len(segments) <= 3:
        from kernels.reduce_partials import reduce_partials  # a CPU needs no Triton
        from kernels.sparse_gemv import sparse_gemv

        return reduce_partials(
            sparse_gemv(x.contiguous(), weight, thresholds, segments, scales, zeros), x.dtype, None, None
        )
    if x.device.type == "cpu" and x.shape[0] <= MAX_GATHER_ROWS and (gather := native_row_gather()) is not None:
        return gather(x.contiguous(), weight, thresholds, segments, scales, zeros)
    products = [
        x.masked_fill(x.abs() < threshold, 0) @ columns
        for threshold, columns in zip(thresholds.to(x.dtype), _columns(weight, segments, scales, zeros), strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


@sparse_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    segments: list[int],
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], sum(segments))


def _columns(
    weight: Tensor, segments: list[int], scales: Tensor | None, zeros: Tensor | None
) -> tuple[Tensor, ...]:  # fmt: skip
    if scales is not None:
        weight = dequantize(weight, scales, zeros)
    return weight.split(segments, dim=1)


def _check(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    segments: list[int],
    scales: Tensor | None,
    zeros: Tensor | None,
) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [B, K] and [K, N]")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or thresholds.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype} and thresholds {thresholds.dtype}: expected fp32, bf16 or fp16, and fp32")
    if scales is not None:
        check_quantized(weight, scales, zeros, x.shape[1])
        group_size = packed_columns(weight) // scales.shape[1]
        if any(n % group_size for n in segments):
            raise ValueError(f"segments {segments} are no multiples of the group size {group_size}")
    dtype, N = (weight.dtype, weight.shape[1]) if scales is None else (scales.dtype, packed_columns(weight))
    if x.dtype != dtype or x.device != weight.device or thresholds.device != x.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, weight {dtype} on {weight.device}: expected the same")
    if weight.stride(1) != 1:
        raise ValueError(f"weight has strides {weight.stride()}: its rows must be contiguous")
    J, K = len(segments), weight.shape[0]
    if thresholds.shape not in ((J,), (J, K)) or sum(segments) != N:
        raise ValueError(f"segments {segments} with thresholds {tuple(thresholds.shape)} do not cover {N} columns")
