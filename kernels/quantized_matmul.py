"""Dense product with a quantized weight for many rows (prefill): a block of columns at a time becomes floats."""

import torch
from torch import Tensor

from kernels.packing import Weight, check_quantized, dequantize, packed_columns

COLUMNS_AT_ONCE = 4096  # of weights in floats: 4096 x 14336 bf16 are 117 MB


def floats(values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The weight [K, N] in the scales' dtype, by the fastest means of the device."""
    if values.is_cuda:
        from kernels.dequantize import launch  # a CPU needs no Triton

        return launch(values, scales, zeros)
    return dequantize(values, scales, zeros)


@torch.library.custom_op("teal::quantized_matmul", mutates_args=())
def quantized_matmul(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """x [..., K] times a quantized weight [K, N], a block of columns at a time: no full copy in floats. [..., N].

    Weights are rounded to x's dtype, once, from fp32. Raises ValueError on a mismatch.
    """
    check_quantized(Weight(values, scales, zeros), x.shape[-1])
    if x.dtype != scales.dtype:
        raise ValueError(f"x is {x.dtype} and scales {scales.dtype}: expected the same")
    N, groups = packed_columns(values), scales.shape[1]
    group_size = N // groups
    step = max(1, COLUMNS_AT_ONCE // group_size)  # groups
    words = values.shape[1] // groups
    y = x.new_empty(*x.shape[:-1], N)
    for g in range(0, groups, step):
        weight = floats(
            values[:, g * words : (g + step) * words],
            scales[:, g : g + step],
            None if zeros is None else zeros[:, g : g + step],
        )
        y[..., g * group_size : g * group_size + weight.shape[1]] = x @ weight
    return y


@quantized_matmul.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed_columns(values))
