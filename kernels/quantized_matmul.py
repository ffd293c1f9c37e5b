"""Dense product with a quantized weight for many rows (prefill): a block of columns at a time becomes floats."""

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_kernels
from teal.kernels.formats.packing import Weight, check_quantized, dequantize
from teal.kernels.matmul import matmul

# Whole groups, of weights in floats: 16,384 x 4096 in bf16 are 134 MB. On an H100 blocks of 4096, which its L2 cache
# can hold, took 5% longer for gate,up of Llama-3-8B and 512 tokens. Each block costs the host 0.1 ms.
COLUMNS_AT_ONCE = 16384


def floats(weight: Weight, out: Tensor | None = None) -> Tensor:
    """A quantized weight [K, N] in the scales' dtype, by the fastest means of the device; in out, where given."""
    values, scales, zeros, refined = weight
    assert scales is not None
    if values.is_cuda:
        from teal.kernels.dequantize import launch  # a CPU needs no Triton

        return launch(values, scales, zeros, refined, out)
    if values.device.type == "cpu" and (native := native_kernels()) is not None:
        out = scales.new_empty(weight.K, weight.N) if out is None else out
        native.dequantize(values, scales, zeros, refined, out)
        return out
    found = dequantize(values, scales, zeros, refined)
    return found if out is None else out.copy_(found)


def quantized_matmul(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    refined: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K] times a quantized weight [K, N], a block of columns at a time: no full copy in floats. [..., N].

    Weights are rounded to x's dtype, once, from fp32. out_dtype, by default x's, may be fp32: sums are then not
    rounded, and on a CPU, whose products round theirs, weights are not either. Raises ValueError on a mismatch.

    Under torch.compile the weight becomes floats, whole, by a kernel of Inductor's. A call of an op of our own costs an
    H100's host 0.2 ms and more. 128 of them took 101 ms before the first token of Llama-3-8B in 4 bits, where the GPU
    was busy for 20. x's entries of refined channels are then appended to x, and all K + E rows are multiplied. Inductor
    would add the second rows to their channels by atomics, on a weight in fp32.
    """
    if out_dtype == torch.float32 and (x.device.type == "cpu" or torch.compiler.is_compiling()):
        x, scales = x.float(), scales.float()
    if torch.compiler.is_compiling():
        x = x if refined is None else torch.cat((x, x[..., refined]), dim=-1)
        return x @ dequantize(values, scales, zeros)
    quantized = Weight(values, scales, zeros, refined)
    check_quantized(quantized, x.shape[-1])
    if x.dtype != scales.dtype:
        raise ValueError(f"x is {x.dtype} and scales {scales.dtype}: expected the same")
    K, N = x.shape[-1], quantized.N
    rows = x.reshape(-1, K)
    y = x.new_empty(rows.shape[0], N, dtype=out_dtype)
    memory = x.new_empty(K * min(N, COLUMNS_AT_ONCE))  # one for all blocks
    for begin in range(0, N, COLUMNS_AT_ONCE):
        end = min(N, begin + COLUMNS_AT_ONCE)
        weight = floats(quantized.columns(begin, end), memory[: K * (end - begin)].view(K, -1))
        if x.device.type == "cpu":
            y[:, begin:end] = matmul(rows, weight)
        elif y.dtype == x.dtype:
            torch.mm(rows, weight, out=y[:, begin:end])
        else:
            y[:, begin:end] = torch.mm(rows, weight, out_dtype=y.dtype)
    return y.view(*x.shape[:-1], N)
