"""The sparsity that users' texts achieve: counted over each layer's first tokens, then one line in vLLM's log."""

import logging
from dataclasses import dataclass, field

from torch import Tensor

from teal.teal_layers import entries_kept

logger = logging.getLogger("vllm.teal")  # vLLM's handlers are those of its own name
TOKENS = 512  # that a layer counts


@dataclass(slots=True)
class Counter:
    """Of one layer: how many of its weights were kept, and how many there were, in so many tokens."""

    sizes: list[int]
    tokens: int = 0
    kept: float = 0.0
    seen: float = 0.0


@dataclass(slots=True)
class Achieved:
    """Counters of the layers of one process. planned is the plan's target."""

    planned: float
    counters: list[Counter] = field(default_factory=list)
    done: int = 0

    def new_counter(self, sizes: list[int]) -> int:
        """The number of a counter for a further layer, with so many output channels for each threshold."""
        self.counters.append(Counter(sizes))
        return len(self.counters) - 1

    @property
    def is_complete(self) -> bool:
        """Whether every layer has counted enough."""
        return self.done == len(self.counters)

    def count(self, number: int, rows: Tensor, thresholds: Tensor) -> None:
        """Count the entries of rows [B, K] of a layer's input, unless it has seen enough. After the last one: log."""
        counter = self.counters[number]
        if counter.tokens >= TOKENS:
            return
        kept = entries_kept(rows, thresholds.to(rows.dtype)).tolist()
        counter.tokens += len(rows)
        counter.kept += sum(size * count for size, count in zip(counter.sizes, kept, strict=True))
        counter.seen += sum(counter.sizes) * rows.numel()
        self.done += counter.tokens >= TOKENS
        if self.is_complete:
            logger.info("teal: sparsity %.1f%% achieved, %g%% planned", 100 * self.sparsity(), 100 * self.planned)

    def sparsity(self) -> float:
        """The share of all layers' weights that their inputs' small entries left unread so far."""
        return 1 - sum(c.kept for c in self.counters) / max(1.0, sum(c.seen for c in self.counters))
