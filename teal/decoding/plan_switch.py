"""Switch a sparse model between plans in a fraction of a step's time, unnoticed by steps captured in CUDA graphs.

A plan's thresholds are prepared once. Plans whose thresholds have the same shapes share a layout: the tensors that the
modules read, into which a switch copies. What was captured under one of them replays with the thresholds of another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from teal.layers.phase import call_state
from teal.model import Transformer
from teal.plan import SparsityPlan
from teal.teal_layers import SparseLinear, sparse_layers, sparsify


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What the modules read under some plans: segments of each, then thresholds and name_thresholds of each in turn."""

    segments: list[list[int]]
    tensors: list[Tensor]

    @property
    def shapes(self) -> tuple[list[list[int]], list[torch.Size]]:
        return self.segments, [tensor.shape for tensor in self.tensors]


class Tally:
    """Entries kept and seen by the sparse modules under one plan, apart from those under others."""

    def __init__(self, modules: list[SparseLinear]) -> None:
        self.kept = [torch.zeros_like(module.kept) for module in modules]
        self.seen = [torch.zeros_like(module.seen) for module in modules]


class PlanSwitch:
    """Sets the thresholds of a model that is sparse already."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.state = model, call_state(model)
        self.modules = [module for layer in sparse_layers(model) for module in layer]
        self.layouts: list[Layout] = []
        self.idle = self.counted = self.tally()  # of nothing
        self.prepared: list[tuple[SparsityPlan, int, list[Tensor]]] = []  # layout's number, and what its tensors get

    @property
    def sparse_share(self) -> float:
        """teal_layers.sparse_prefill's share, on which keys and values of a prompt depend."""
        return self.state.sparse_share

    @torch.inference_mode()
    def use(self, plan: SparsityPlan) -> int:
        """Decode by plan from now on; returns the number of its layout. Raises UserError if it is for another model."""
        number, values = self._thresholds(plan)
        layout = self.layouts[number]
        pairs = zip(layout.tensors[::2], layout.tensors[1::2], strict=True)
        for module, segments, (thresholds, name_thresholds) in zip(self.modules, layout.segments, pairs, strict=True):
            module.segments = segments
            if module.thresholds is not thresholds:
                module.thresholds = thresholds
            if module.name_thresholds is not name_thresholds:
                module.name_thresholds = name_thresholds
        self.state.replaced += 1
        torch._foreach_copy_(layout.tensors, values)
        return number

    def _thresholds(self, plan: SparsityPlan) -> tuple[int, list[Tensor]]:
        for known, number, values in self.prepared:
            if known is plan or known == plan:
                return number, values
        sparsify(self.model, plan)
        tensors = [tensor for module in self.modules for tensor in (module.thresholds, module.name_thresholds)]
        found = Layout([module.segments for module in self.modules], tensors)
        number = next((i for i, layout in enumerate(self.layouts) if layout.shapes == found.shapes), len(self.layouts))
        if number == len(self.layouts):
            self.layouts.append(found)
        values = [tensor.clone() for tensor in tensors]
        self.prepared.append((plan, number, values))
        return number, values

    @torch.inference_mode()
    def tally(self) -> Tally:
        """A new one."""
        return Tally(self.modules)

    def count(self, tally: Tally | None) -> None:
        """From now on let teal_layers count in tally, or not at all. What was counted in another one stays there."""
        chosen = tally or self.idle
        if chosen is self.counted:
            return
        self.counted = chosen
        for module, kept, seen in zip(self.modules, chosen.kept, chosen.seen, strict=True):
            module.kept, module.seen = kept, seen
        self.state.counting = tally is not None
