"""What the plan must know of a GPU and of a model: sizes and formats."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.model import ModelConfig

PRODUCTS = ("QKV", "O", "MLP", "DOWN", "HEAD")  # as the config's names begin
MAX_INPUT_GROUPS = 8  # of a block's channels, where groups lie along the input: columns of a tensor core's B


@dataclass(frozen=True, slots=True)
class Device:
    """What the plan must know of a GPU: multiprocessors, bytes of shared memory of a block, compute capability.

    gb_per_s: of its memory, as its clock and bus say; 0 if that is not known.
    """

    multiprocessors: int
    shared_bytes: int
    capability: tuple[int, int]
    gb_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Format:
    """Shape and format of a product's weight. group: columns to a scale, 1 for floats.

    channels: to a scale, where groups lie along the input; group is how many columns are packed together then.
    """

    K: int
    N: int
    bits: int
    group: int
    channels: int = 0

    @classmethod
    def of(cls, weight: Weight) -> "Format":
        return cls(weight.K, weight.N, weight.bits, weight.group_size, weight.channels)

    @property
    def columns(self) -> int:
        """Of a granule."""
        return 128 // self.bits

    @property
    def unit(self) -> int:
        """Granules that are cut together: a warp's have one list, where groups lie along the input (formats.cuh)."""
        return 8 if self.channels else 1

    @property
    def least_splits(self) -> int:
        """Of the channels: with fewer, neighbours would be of more than MAX_INPUT_GROUPS groups along the input."""
        return math.ceil(self.K / self.channels / (MAX_INPUT_GROUPS - 1)) if self.channels else 1

    @property
    def granules(self) -> int:
        """Of a row."""
        return self.N // self.columns

    def granule_of(self, columns: Tensor) -> Tensor:
        """The granules that these columns are in."""
        if self.bits != 4:
            return columns // self.columns
        return columns // self.group * (self.group // 32) + columns % (self.group // 8) // 4

    def teams(self, threads: int) -> int:
        """Of lanes that sum a granule together."""
        return threads // 4 if self.bits == 4 else threads

    def __str__(self) -> str:
        return f"Format<{self.K}, {self.N}, {self.bits}, {self.group}, {self.channels}>"


@dataclass(frozen=True, slots=True)
class Model:
    """The model as the plan sees it. head is None for one in floats, which is [V, C].

    cache_bits: of a key's or value's entry, 16 or 8 (kernels/formats/kv_int8.py). Of ranks that share a model this is
    one's part. refined: for each product, the head last, the refined channels of every weight that has some.
    embedding_bits: of an entry as the kernel reads it: 16, or 32 where a rounded one's row becomes floats before.
    """

    config: ModelConfig
    dtype: torch.dtype
    products: tuple[Format, Format, Format, Format]  # q,k,v; o; gate,up; down
    head: Format | None
    cache_bits: int = 16
    rank: int = 0
    ranks: int = 1
    refined: tuple[tuple[Tensor, ...], ...] = ((),) * len(PRODUCTS)
    embedding_bits: int = 16

    @property
    def heads_of_key(self) -> int:
        return self.config.num_heads // self.config.num_kv_heads

    @property
    def gathered_head(self) -> Format:
        """The head as gather.cuh reads it; one in floats it does not read, and has the least of formats here."""
        return self.head or Format(self.config.hidden_size, 8, 16, 1)
