"""Modules that replace a Transformer's projections from outside: `sparsify(model, plan)`.

A SparseLinear stores its weight input-channel-major, [in_features, out_features], so that an input
entry below the threshold skips one contiguous row. Decode goes through the sparse product. Prefill uses the same
storage as a dense matrix, since it is bound by arithmetic and not by memory (TEAL, section 5.4).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from teal.errors import UserError
from teal.kernels.formats.packing import dequantize
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.sparse_linear import sparse_linear
from teal.layers.block_linear import BlockLinear, BlockWeight
from teal.layers.phase import Phase, PhasedModule, call_state
from teal.layers.quantized_linear import QuantizedLinear
from teal.layers.team import GatheredHead, team_of
from teal.model import Block, Transformer
from teal.plan import SparsityPlan
from teal.projection import Projection


class SparseLinear(PhasedModule):
    """nn.Linear whose input is thresholded by magnitude, with a threshold per named output segment.

    names and sizes list the projections stacked in the weight, e.g. ("q", "k", "v") and their widths. The weight of a
    QuantizedLinear or BlockLinear is shared as it is; scales is None for floats and blocks. refined is None without
    second rows.
    Bits of the result match between runs; between thread counts they need not.
    """

    thresholds: Tensor
    name_thresholds: Tensor
    refined: Tensor | None
    kept: Tensor
    seen: Tensor

    weight: nn.Parameter | BlockWeight

    def __init__(
        self, linear: nn.Linear | QuantizedLinear | BlockLinear, names: tuple[str, ...], sizes: list[int]
    ) -> None:
        super().__init__()
        self.names = names
        self.sizes = sizes
        self.scales: nn.Parameter | None = None
        self.zeros: nn.Parameter | None = None
        refined = None
        if isinstance(linear, QuantizedLinear):
            self.weight, self.scales, self.zeros = linear.weight, linear.scales, linear.zeros
            refined, self.state = linear.refined, linear.state
        elif isinstance(linear, BlockLinear):
            self.weight, self.state = linear.weight, linear.state
        else:
            self.weight = nn.Parameter(linear.weight.data.t().contiguous(), requires_grad=False)
        self.refined = None if refined is None else nn.Buffer(refined)
        self.bias = linear.bias
        self.set_thresholds([0.0] * len(names))
        # Entries kept, one count per name, then those of refined channels among them; and entries seen. They are filled
        # only while self.state says that they are counted.
        device = self.weight.device
        self.kept = nn.Buffer(torch.zeros(2, len(names), dtype=torch.int64, device=device), persistent=False)
        self.seen = nn.Buffer(torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def set_thresholds(self, thresholds: list[float]) -> None:
        """Use these thresholds of |x| from now on, one for each name."""
        device = self.weight.device
        merged = [(self.sizes[0], thresholds[0])]
        for size, threshold in zip(self.sizes[1:], thresholds[1:], strict=True):
            # On a CPU neighbours of one threshold take one pass over x. On a GPU a captured step keeps its shapes when
            # the plan changes.
            if threshold == merged[-1][1] and device.type == "cpu":
                merged[-1] = (merged[-1][0] + size, threshold)
            else:
                merged.append((size, threshold))
        limits, of_names = (torch.tensor(v, device=device) for v in ([t for _, t in merged], thresholds))
        self.read(
            [size for size, _ in merged], self._kept("thresholds", limits), self._kept("name_thresholds", of_names)
        )

    @torch.inference_mode()
    def _kept(self, attribute: str, value: Tensor) -> Tensor:
        """value in the tensor that attribute holds, if that has its shape: a captured step then sees the new one."""
        old = getattr(self, attribute, None)
        if isinstance(old, Tensor) and old.shape == value.shape:
            return old.copy_(value)
        return nn.Buffer(value.clone(), persistent=False)

    def read(self, segments: list[int], thresholds: Tensor, name_thresholds: Tensor) -> None:
        """Read thresholds from these tensors from now on: one for each segment, and one for each name."""
        self.segments = segments
        for attribute, tensor in (("thresholds", thresholds), ("name_thresholds", name_thresholds)):
            if getattr(self, attribute, None) is not tensor:  # which takes microseconds
                setattr(self, attribute, tensor)
        self.state.replaced += 1

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, K] -> [B, T, N], of which self.sparse_tokens(T) are sparse."""
        T = x.shape[1]
        dense_tokens = T - self.sparse_tokens(T)
        if dense_tokens == 0:
            y = self._sparse(x)
        elif dense_tokens == T:
            y = self._dense(x)
        else:
            y = torch.cat((self._dense(x[:, :dense_tokens]), self._sparse(x[:, dense_tokens:])), dim=1)
        return y if self.bias is None else y + self.bias

    def sparse_tokens(self, T: int) -> int:
        """How many of a call's T tokens, the last ones: all in decode, in prefill a share that self.state names."""
        return T if self.state.phase is Phase.DECODE else round(T * self.state.sparse_share)

    def _sparse(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.state.counting:
            self._count(rows)
        if isinstance(self.weight, BlockWeight):
            y = self.weight.sparse(rows, self.thresholds, self.segments)
            return y.view(*x.shape[:-1], -1)
        y = sparse_linear(rows, self.weight, self.thresholds, self.segments, self.scales, self.zeros, self.refined)
        return y.view(*x.shape[:-1], -1)

    def _count(self, rows: Tensor) -> None:
        limits = self.name_thresholds.to(rows.dtype)
        self.kept[0] += entries_kept(rows, limits)
        if self.refined is not None:
            self.kept[1] += entries_kept(rows[:, self.refined], limits)
        self.seen.add_(rows.numel())

    def _dense(self, x: Tensor) -> Tensor:
        if isinstance(self.weight, BlockWeight):
            return self.weight.many(x)
        if self.scales is None:
            return x @ self.weight
        return quantized_matmul(x, self.weight, self.scales, self.zeros, self.refined)

    def dequantized(self) -> Tensor:
        """The weight [K, N] in floats."""
        if isinstance(self.weight, BlockWeight):
            return self.weight.floats()
        return self.weight if self.scales is None else dequantize(self.weight, self.scales, self.zeros, self.refined)

    def bytes_read(self) -> float:
        """Bytes of weights that one token reads: less the rows skipped, if entries were counted.

        A kept entry of x reads its channel's row, and a second one if the channel is refined; these are counted apart.
        """
        total = sum(t.nbytes for t in weight_tensors(self))
        if not int(self.seen):
            return total
        weight = self.weight
        rows, fixed = (weight.K, weight.scale_bytes) if isinstance(weight, BlockWeight) else (len(weight), 0)
        tokens = int(self.seen) / (rows - (0 if self.refined is None else len(self.refined)))
        shares = self.kept.sum(0).cpu() / (tokens * rows)  # of the rows, for each name
        return float((torch.tensor(self.sizes) * shares).sum()) * (total - fixed) / sum(self.sizes) + fixed


def weight_tensors(module: nn.Module) -> list[Tensor]:
    """What a product with a module's weight reads: its values, or its blocks; scales and zeros."""
    parts = [t for name in ("weight", "scales", "zeros") if (t := getattr(module, name, None)) is not None]
    return list(parts[0].data) if isinstance(parts[0], BlockWeight) else parts


def entries_kept(rows: Tensor, limits: Tensor) -> Tensor:
    """How many entries of rows [B, K] reach each limit [J]: int64 [J]."""
    return torch.stack([(rows.abs() >= limit).sum() for limit in limits])


def sparsify(model: Transformer, plan: SparsityPlan) -> Transformer:
    """Replace the projections of every block, in place, by SparseLinear modules with the plan's thresholds.

    A model that is sparse already only takes the new thresholds. Each weight is transposed and the
    old one dropped before the next, so memory grows by one weight at most. Raises UserError if the
    plan is for another model, or model is none.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"sparsify takes a model, not {type(model).__name__}; an Engine's is engine.model")
    plan.check_fits(model.config)
    for block, modules, layer in zip(model.blocks, sparse_layers(model), plan.layers, strict=True):
        thresholds = {name: p.threshold for name, p in layer.items()}
        if modules:  # sparse already
            for module in modules:
                module.set_thresholds([thresholds[name] for name in module.names])
        else:
            sparsify_block(block, thresholds)
    return model


def sparsify_block(block: Block, thresholds: dict[str, float]) -> None:
    """As sparsify, for one block and a threshold for each projection."""
    sparsify_layer(block, block.projections(), thresholds, SparseLinear)


def sparsify_layer(
    layer: nn.Module, projections: Iterable[Projection], thresholds: dict[str, float], kind: type[SparseLinear]
) -> None:
    """As sparsify_block, for any module in which projections say where its linear layers are; kind replaces them."""
    for p in projections:
        module = layer.get_submodule(p.module)
        if not isinstance(module, SparseLinear):
            assert isinstance(module, (nn.Linear, QuantizedLinear, BlockLinear))
            module = kind(module, p.names, list(p.sizes))
            layer.set_submodule(p.module, module)
        module.set_thresholds([thresholds[name] for name in p.names])


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a Transformer, or the layers of the text model within a model of transformers."""
    decoder: Any = model if isinstance(model, Transformer) else cast(Any, model).get_decoder()
    return decoder.layers


def sparse_layers(model: nn.Module) -> list[list[SparseLinear]]:
    """The SparseLinear modules of each of layers_of(model), in the order of its projections; empty lists if dense."""
    return [[m for m in layer.modules() if isinstance(m, SparseLinear)] for layer in layers_of(model)]


@torch.inference_mode()
def set_counting(model: nn.Module, on: bool) -> None:
    """Start (from zero) or stop counting how many input entries each sparse projection keeps.

    model: what sparsify returned, here or in transformers.py.
    """
    for layer in sparse_layers(model):
        for module in layer:
            module.kept.zero_()
            module.seen.zero_()
    call_state(model).counting = on


def achieved_sparsity(model: nn.Module) -> list[dict[str, float]]:
    """Measured share of dropped entries since counting began, by layer and projection; empty dicts if none seen.

    model: as for set_counting. Of one that several ranks share it is that of this one's inputs, unless all of them ask.
    """
    result, team = [], team_of(model)
    for layer in sparse_layers(model):
        shares: dict[str, float] = {}
        for module in layer:
            counts = torch.cat((module.kept[0], module.seen[None]))
            *kept, seen = (counts if team is None else team.total(counts)).tolist()
            if seen:
                shares |= {n: 1 - k / seen for n, k in zip(module.names, kept, strict=True)}
        result.append(shares)
    return result


def weight_bytes_per_token(model: Transformer, float_bytes: int | None = None) -> float:
    """Bytes of weights one decode step reads: all projections and the head, less the rows that sparsity skips.

    Skipped rows are those counted since set_counting; without a count all rows are taken as read. float_bytes is what
    a weight or scale in floats counts, whatever dtype it has here; None is the size of that dtype. Of a model that
    several ranks share it is what this one reads, or all do, as in achieved_sparsity.
    """
    modules = [
        m for m in model.layers.modules() if isinstance(m, (SparseLinear, QuantizedLinear, BlockLinear, nn.Linear))
    ]
    total = 0.0
    head: nn.Module = model.lm_head
    for module in (*modules, head.inner if isinstance(head, GatheredHead) else head):
        parts = weight_tensors(module)
        held = sum(part.nbytes for part in parts)
        sizes = [float_bytes if float_bytes and part.is_floating_point() else part.itemsize for part in parts]
        counted = sum(part.numel() * size for part, size in zip(parts, sizes, strict=True))
        # The rows that are read have their bytes in the same parts as all rows.
        total += counted * (module.bytes_read() / held if isinstance(module, SparseLinear) else 1)
    if (team := team_of(model)) is not None:
        return float(team.total(torch.tensor(total, dtype=torch.float64, device=model.device)))
    return total


@contextmanager
def sparse_prefill(model: Transformer, share: float = 1.0) -> Iterator[None]:
    """Within the block prefill is sparse too, on the last share of a call's tokens.

    1 is what decoding them one by one would compute; 0.5 is the paper's evaluation (section 5.1).
    """
    state = call_state(model)
    state.sparse_share = share
    try:
        yield
    finally:
        state.sparse_share = 0.0
