"""A linear layer's product within vLLM's graphs: sparse where a small batch decodes, dense otherwise.

One op holds both. torch.compile sees neither its choice nor its kernels, so a graph of any batch size takes it. A CUDA
graph keeps the choice that it was captured with.
"""

import torch
from torch import Tensor
from vllm.config import CompilationConfig

from teal.kernels.gemv.op import make_op
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.sparse_linear import sparse_linear
from teal.options import MAX_ROWS
from teal.vllm_plugin.achieved import Achieved
from teal.vllm_plugin.phase import is_decode, is_measurable

# Of floats on a GPU. Llama-3-8B at 50%, over cuBLAS: 2 texts take 0.87 of its time on an H100 and 1.15 on an H200.
# 4 take 1.01 and 1.36. Rounded weights have no faster product here, whatever is kept.
FLOAT_ROWS = 2


def most_rows(is_rounded: bool, device_type: str) -> int:
    """Up to how many tokens of a decode step a product is sparse; with more, some token needs nearly every weight."""
    return MAX_ROWS if is_rounded or device_type == "cpu" else FLOAT_ROWS


class Shared:
    """What this process's layers share, and an op cannot be given."""

    config: object = None  # whose layers these are
    compilation: CompilationConfig
    achieved = Achieved(0.0)  # of no layer yet
    sparse_prompts: bool


def launch(
    x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int], counter: int, scales: Tensor | None = None,
    zeros: Tensor | None = None, refined: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [..., K] times a weight [K, N] as sparse_linear takes it: [..., N] in x's dtype.

    Entries below the thresholds count as 0 if the batch decodes and has at most most_rows tokens. counter: the number
    of what counts kept entries (achieved.py), -1 if the product is always dense.
    """
    rows = x.reshape(-1, x.shape[-1])
    is_sparse, few = counter >= 0, len(rows) <= most_rows(scales is not None, weight.device.type)
    if is_sparse and not Shared.achieved.is_complete and is_measurable(Shared.compilation, len(rows)):
        Shared.achieved.count(counter, rows, thresholds)
    if is_sparse and (Shared.sparse_prompts or (few and is_decode(Shared.compilation))):
        y = sparse_linear(rows, weight, thresholds, segments, scales, zeros, refined)
    elif scales is None:
        y = torch.mm(rows, weight)
    elif few:  # each row reads the weight as it is stored
        y = sparse_linear(rows, weight, torch.zeros_like(thresholds), segments, scales, zeros, refined)
    else:
        y = quantized_matmul(rows, weight, scales, zeros, refined)
    return y.view(*x.shape[:-1], sum(segments))


phased_linear = make_op("phased_linear", launch, lambda x, segments: x.new_empty(*x.shape[:-1], sum(segments)))
