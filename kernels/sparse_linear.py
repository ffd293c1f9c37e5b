"""x @ weight where small |x| count as zero, and the weight rows they would meet are never read.

Layout: weight is input-channel-major [K, N], so one dropped entry of x skips one contiguous row. For a few rows of x
cpu/gather.cpp computes it on a CPU, and sparse_gemv.py on CUDA. For more, x is masked and multiplied densely.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from teal.kernels.cpu.native import native_kernels
from teal.kernels.formats.packing import Weight, check_quantized
from teal.kernels.gemv.op import make_op
from teal.kernels.matmul import matmul
from teal.kernels.quantized_matmul import floats
from teal.options import MAX_ROWS

# With more rows of x nearly every weight row is kept by one of them, and a dense product is faster. On 2 Xeon cores
# (AVX-512), 1536 x 3072 bf16 at 50%, gather / dense: 2 rows 533 / 1247 us, 3 868 / 1607, 4 1043 / 1454.
MAX_GATHER_ROWS = 4


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    thresholds: Tensor,
    segments: list[int],
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    refined: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each column segment of x @ weight, with entries |x| below the segment's threshold taken as 0.

    x [B, K] and weight [K, N] are of one dtype (bf16, fp16 or fp32) and device. Or weight, scales, zeros and refined
    are a quantized weight [K, N] (packing.py), whose scales have x's dtype. thresholds are fp32 [J], rounded to x's
    dtype before they are compared; segments: J widths that add up to N; out_dtype: x's or fp32. Returns [B, N] in
    out_dtype, by default x's. Raises ValueError on a mismatch.

    Only torch.compile needs an op. The first call of one imports Dynamo: 0.75 s on 2 Xeon cores before the first sparse
    token. Each call takes 5 us more than this function.
    """
    if torch.compiler.is_compiling():
        return sparse_linear_op(x, weight, thresholds, segments, scales, zeros, refined, out_dtype)
    matrix = Weight(weight, scales, zeros, refined)
    _check(x, matrix, thresholds, segments)
    if x.is_cuda and x.shape[0] <= MAX_ROWS and len(segments) <= 3:
        from teal.kernels.reduce_partials import reduce_partials  # a CPU needs no Triton
        from teal.kernels.sparse_gemv import sparse_gemv

        partials = sparse_gemv(x.contiguous(), weight, thresholds, segments, scales, zeros, refined)
        return reduce_partials(partials, out_dtype or x.dtype, None, None)
    if x.device.type == "cpu" and x.shape[0] <= MAX_ROWS and (native := native_kernels()) is not None:
        parts = x.contiguous().split(MAX_GATHER_ROWS)
        arguments = (weight, thresholds, segments, scales, zeros, refined, out_dtype)
        found = [native.row_gather(part, *arguments) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)
    columns = (weight if scales is None else floats(matrix)).split(segments, dim=1)
    wide = out_dtype or x.dtype
    products = [
        matmul(drop_small(x, threshold).to(wide), part.to(wide))
        for threshold, part in zip(thresholds.to(x.dtype), columns, strict=True)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, dim=1)


def drop_small(x: Tensor, threshold: Tensor) -> Tensor:
    """x with 0 for the entries whose magnitude is below threshold, a scalar of x's dtype; NaN stays."""
    if x.is_cuda:
        return x.masked_fill(x.abs() < threshold, 0)
    # On a CPU comparing and filling takes 1.2 ms for 512 x 576 bf16 entries, hardshrink 0.04. It drops |x| <= limit.
    limit = torch.nextafter(threshold, threshold.new_tensor(-math.inf))
    return F.hardshrink(x, limit.item())


sparse_linear_op = make_op(
    "sparse_linear",
    sparse_linear,
    lambda x, segments, out_dtype: x.new_empty(x.shape[0], sum(segments), dtype=out_dtype),
)


def _check(x: Tensor, weight: Weight, thresholds: Tensor, segments: list[int]) -> None:
    values = weight.values
    if x.dim() != 2 or values.dim() != 2 or x.shape[1] != weight.K:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(values.shape)}: expected [B, K] and [K, N]")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or thresholds.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype} and thresholds {thresholds.dtype}: expected fp32, bf16 or fp16, and fp32")
    if weight.scales is not None or weight.refined is not None:
        check_quantized(weight, x.shape[1], segments)
    if x.dtype != weight.dtype or x.device != values.device or thresholds.device != x.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {values.device}: expected the same")
    if values.stride(1) != 1:
        raise ValueError(f"weight has strides {values.stride()}: its rows must be contiguous")
    if thresholds.shape != (len(segments),) or not thresholds.is_contiguous() or sum(segments) != weight.N:
        raise ValueError(
            f"segments {segments} with thresholds {tuple(thresholds.shape)} do not cover {weight.N} columns"
        )
