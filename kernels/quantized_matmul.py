"""Dense product with a quantized weight for many rows (prefill): a block of columns at a time becomes floats."""

import torch
from torch import Tensor

from kernels.packing import Weight, check_quantized, dequantize, packed_columns

# Of weights in floats: 16,384 x 4096 in bf16 are 134 MB. On an H100 blocks of 4096, which its L2 cache can hold, took 5%
# longer for gate,up of Llama-3-8B and 512 tokens, and each block costs the host 0.1 ms.
COLUMNS_AT_ONCE = 16384


def floats(values: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The weight [K, N] in the scales' dtype, by the fastest means of the device; in out, where given."""
    if values.is_cuda:
        from kernels.dequantize import launch  # a CPU needs no Triton

        return launch(values, scales, zeros, out)
    weight = dequantize(values, scales, zeros)
    return weight if out is None else out.copy_(weight)


@torch.library.custom_op("teal::quantized_matmul", mutates_args=())
def blockwise_matmul(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
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
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(rows.shape[0], N)
    memory = x.new_empty(x.shape[-1] * min(N, step * group_size))  # one for all blocks
    for g in range(0, groups, step):
        columns = slice(g * group_size, min(N, (g + step) * group_size))
        weight = memory[: x.shape[-1] * (columns.stop - columns.start)].view(x.shape[-1], -1)
        floats(
            values[:, g * words : (g + step) * words],
            scales[:, g : g + step],
            None if zeros is None else zeros[:, g : g + step],
            weight,
        )
        torch.mm(rows, weight, out=y[:, columns])
    return y.view(*x.shape[:-1], N)


@blockwise_matmul.register_fake
def _(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed_columns(values))


def quantized_matmul(x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """As blockwise_matmul. Under torch.compile the weight becomes floats, whole, by a kernel of Inductor's.

    A call of our own op costs an H100's host 0.2 ms and more, and 128 of them 101 ms before the first token of
    Llama-3-8B in 4 bits, where the GPU was busy for 20.
    """
    if torch.compiler.is_compiling():
        return x @ dequantize(values, scales, zeros)
    return blockwise_matmul(x, values, scales, zeros)
