"""Modules that replace a Transformer's projections from outside: `sparsify(model, plan)`.

A SparseLinear stores its weight input-channel-major, [in_features, out_features], so that an input
entry below the threshold skips one contiguous row. Decoding (one token a call) goes through the
sparse product; prefill uses the same storage as a dense matrix, since it is bound by arithmetic and
not by memory (TEAL, section 5.4).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from errors import UserError
from kernels.sparse_linear import sparse_linear
from model import Transformer
from plan import SparsityPlan


class SparseLinear(nn.Module):
    """nn.Linear whose input is thresholded by magnitude, with a threshold per named output segment.

    names and sizes list the projections stacked in the weight, e.g. ("q", "k", "v") and their widths.
    Bits of the result match between runs; between thread counts they need not.
    """

    def __init__(self, linear: nn.Linear, names: tuple[str, ...], sizes: list[int], thresholds: list[float]) -> None:
        super().__init__()
        self.names = names
        self.sizes = sizes
        self.weight = nn.Parameter(linear.weight.data.t().contiguous(), requires_grad=False)
        self.bias = linear.bias
        self.set_thresholds(thresholds)
        # Entries kept, one count per name, and entries seen; filled only while counting is on.
        self.kept = nn.Buffer(self.weight.new_zeros(len(names), dtype=torch.int64), persistent=False)
        self.seen = nn.Buffer(self.weight.new_zeros((), dtype=torch.int64), persistent=False)
        self.counting = False
        self.sparse_prefill = False

    def set_thresholds(self, thresholds: list[float]) -> None:
        """Use these thresholds on |x| from now on, one for each name."""
        merged = [(self.sizes[0], thresholds[0])]
        for size, threshold in zip(self.sizes[1:], thresholds[1:], strict=True):
            if threshold == merged[-1][1]:  # neighbours that share a threshold share one pass over x
                merged[-1] = (merged[-1][0] + size, threshold)
            else:
                merged.append((size, threshold))
        device = self.weight.device
        self.segments = [size for size, _ in merged]
        self.thresholds = nn.Buffer(torch.tensor([t for _, t in merged], device=device), persistent=False)
        self.name_thresholds = nn.Buffer(torch.tensor(thresholds, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, K] -> [B, T, N]; dense if T > 1 unless sparse_prefill is set."""
        B, T, K = x.shape
        if T > 1 and not self.sparse_prefill:
            y = x @ self.weight
        else:
            rows = x.reshape(B * T, K)
            if self.counting:
                above = rows.abs().float().unsqueeze(-1) >= self.name_thresholds  # [B*T, K, names]
                self.kept.add_(above.sum(dim=(0, 1)))
                self.seen.add_(rows.numel())
            y = sparse_linear(rows, self.weight, self.thresholds, self.segments).view(B, T, -1)
        return y if self.bias is None else y + self.bias


def sparsify(model: Transformer, plan: SparsityPlan) -> Transformer:
    """Replace the projections of every block, in place, by SparseLinear modules with the plan's thresholds.

    A model that is sparse already only takes the new thresholds. Each weight is transposed and the
    old one dropped before the next, so memory grows by one weight at most. Raises UserError if the
    plan has another number of layers than the model.
    """
    c = model.config
    if len(plan.layers) != c.num_layers:
        raise UserError(f"plan has {len(plan.layers)} layers and the model {c.num_layers}; calibrate for this model")
    for block, layer in zip(model.blocks, plan.layers, strict=True):
        for parent, attribute, sizes in (
            (block.attention, "wqkv", {"q": c.q_size, "k": c.kv_size, "v": c.kv_size}),
            (block.attention, "wo", {"o": c.hidden_size}),
            (block.feed_forward, "gate_up", {"gate": c.intermediate_size, "up": c.intermediate_size}),
            (block.feed_forward, "down", {"down": c.hidden_size}),
        ):
            thresholds = [layer[name].threshold for name in sizes]
            old = getattr(parent, attribute)
            if isinstance(old, SparseLinear):
                old.set_thresholds(thresholds)
            else:
                setattr(parent, attribute, SparseLinear(old, tuple(sizes), list(sizes.values()), thresholds))
    return model


def sparse_layers(model: Transformer) -> list[list[SparseLinear]]:
    """The SparseLinear modules of each block, in the order wqkv, wo, gate_up, down; empty lists if dense."""
    return [[m for m in block.modules() if isinstance(m, SparseLinear)] for block in model.layers]


def set_counting(model: Transformer, on: bool) -> None:
    """Start (from zero) or stop counting how many input entries each sparse projection keeps."""
    for layer in sparse_layers(model):
        for module in layer:
            module.kept.zero_()
            module.seen.zero_()
            module.counting = on


def achieved_sparsity(model: Transformer) -> list[dict[str, float]]:
    """Measured share of dropped entries since counting began, by layer and projection; empty dicts if none seen."""
    result = []
    for layer in sparse_layers(model):
        shares: dict[str, float] = {}
        for module in layer:
            seen = int(module.seen)
            if seen:
                shares |= {n: 1 - int(k) / seen for n, k in zip(module.names, module.kept, strict=True)}
        result.append(shares)
    return result


@contextmanager
def sparse_prefill(model: Transformer) -> Iterator[None]:
    """Within the block, calls with many tokens are sparse on every token, as decoding them one by one would be."""
    modules = [m for layer in sparse_layers(model) for m in layer]
    for module in modules:
        module.sparse_prefill = True
    try:
        yield
    finally:
        for module in modules:
            module.sparse_prefill = False
