"""Tensor parallelism: which part of a model each of several ranks holds (Shoeybi et al. 2019, arXiv 1909.08053).

A rank has some heads, some of the hidden channels of the feed-forward layers and some rows of the vocabulary:

    q k v, gate up    cut along their outputs: a rank computes its own heads and channels from the whole input
    o, down           cut along their inputs: results of all ranks add up
    embedding, head   cut along the vocabulary

Its part is a smaller model of the same family, so that whatever runs a model runs a part.
"""

from dataclasses import dataclass, replace
from typing import Literal

from teal.errors import ParameterError
from teal.extras import block_extras
from teal.model import ModelConfig

# What needs all heads at once, by its names in extras.py.
UNSHAREABLE = frozenset({"norms of q and k over all heads"})


@dataclass(frozen=True, slots=True)
class Cut:
    """Which channels of a projection's outputs or inputs a rank holds: start to stop of total."""

    along: Literal["output", "input"]
    start: int
    stop: int
    total: int


@dataclass(frozen=True, slots=True)
class Rank:
    """One of so many processes that share a model."""

    index: int
    count: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The architecture of a rank's blocks. Raises UserError, naming what does not divide."""
        self.check(whole)
        return replace(
            whole,
            num_heads=whole.num_heads // self.count,
            num_kv_heads=max(1, whole.num_kv_heads // self.count),
            intermediate_size=whole.intermediate_size // self.count,
        )

    def check(self, whole: ModelConfig) -> None:
        """Raise UserError, naming what does not divide, unless the ranks can share a model."""
        N = self.count
        for name in UNSHAREABLE.intersection(block_extras(whole)):
            raise ParameterError("{tensor_parallel} {}: this family has {}; leave it out", N, name)
        for name, size in (("attention heads", whole.num_heads), ("hidden channels", whole.intermediate_size)):
            if size % N:
                raise ParameterError(f"{{tensor_parallel}} {{}} does not divide this model's {size} {name}", N)
        if whole.num_kv_heads % N and N % whole.num_kv_heads:
            raise ParameterError(
                f"{{tensor_parallel}} {{}}: this model's {whole.num_kv_heads} key and value heads cannot be shared "
                "evenly; give a divisor or a multiple", N,
            )  # fmt: skip

    def vocabulary(self, whole: ModelConfig) -> range:
        """Rows of the vocabulary of this rank. All ranks have as many, so the last one's may reach beyond its end."""
        rows = -(-whole.vocab_size // self.count)
        return range(self.index * rows, (self.index + 1) * rows)

    def cuts(self, whole: ModelConfig) -> dict[str, Cut]:
        """The part of each projection by its Hugging Face name in a layer, and of embedding and head."""
        rows = self.vocabulary(whole)
        of_vocabulary = Cut("output", rows.start, min(rows.stop, whole.vocab_size), whole.vocab_size)
        found = {"model.embed_tokens": of_vocabulary, "lm_head": of_vocabulary}
        for p, own in zip(whole.projections(), self.config(whole).projections(), strict=True):
            for name, total, size in zip(p.hf_names, p.sizes, own.sizes, strict=True):
                if p.cut == "input":
                    total, size = p.in_features, own.in_features
                # Key and value heads that are fewer than ranks stand on several of them.
                start = self.index * (total // p.unit) // self.count * p.unit
                found[name] = Cut(p.cut, start, start + size, total)
        return found
