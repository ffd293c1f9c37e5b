"""Weights of 8 or 4 bits, input-channel-major like all others, with a scale for each group.

A quantized weight [K, N] is three tensors; row k is input channel k, contiguous.

1. 8 bits: values int8 [K, N], no zeros. A weight is value * scale.

       byte       0    1    2   ...  N-1
       column     0    1    2   ...  N-1

2. 4 bits: values int32 [K, N/8], eight columns to a word, zeros uint8. A weight is (value - zero) * scale. Nibble j of
   word w of a group is the group's column j * group/8 + w: the same nibble of neighbouring words is neighbouring
   columns. A group of 32 columns is four words, 16 bytes. A byte's low nibble stands first:

       word 0     bytes  0..3      columns  0  4 |  8 12 | 16 20 | 24 28
       word 1     bytes  4..7      columns  1  5 |  9 13 | 17 21 | 25 29
       word 2     bytes  8..11     columns  2  6 | 10 14 | 18 22 | 26 30
       word 3     bytes 12..15     columns  3  7 | 11 15 | 19 23 | 27 31

3. Groups along the output: scales and zeros [K, N/group]. A channel that is not read takes its scales with it, and a
   scale multiplies the one activation that all weights of its group meet.

       row k of values    columns 0..group-1 | group..2 group-1 | ...
       row k of scales           scale 0     |     scale 1      | ...

4. Groups along the input, of weights that other tools have rounded: scales and zeros [K/group, N], one of each column
   for so many channels. Words of 4 bits are those of groups of 32 columns.

       channels 0..group-1          row 0 of scales, one for each column
       channels group..2 group-1    row 1 of scales

5. Refined channels, of 4 bits with groups along the output: further rows, one for each channel that refined int32 [E]
   lists, in its order. Such a row holds what rounding left of the channel, rounded to 4 bits in its turn (residual
   quantization, Chen et al. 2010). The channel's weight is the sum of its two rows: 8 bits. x's entry meets both.

       row 0..K-1     channel 0..K-1             4 bits
       row K + j      rest of channel refined[j]     4 bits more
"""

from typing import NamedTuple

import torch
from torch import Tensor

NIBBLES = 8  # to an int32 word
GROUP_SIZES = (128, 64, 32)  # columns to a scale; the kernels know these
INPUT_GROUP_COLUMNS = 32  # whose nibbles are packed together, where groups lie along the input


class Weight(NamedTuple):
    """The weight [K, N] of a product: floats, or values with scales and zeros (packing.py).

    refined: the channels that rows from K on belong to, int32 [E] in rising order; None if there are no such rows.
    """

    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    refined: Tensor | None = None

    @property
    def K(self) -> int:
        """Its channels: rows of values, less those that refine others."""
        return self.values.shape[0] - (0 if self.refined is None else self.refined.numel())

    @property
    def N(self) -> int:
        return self.values.shape[1] if self.scales is None else packed_columns(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """That of x and of what the product is rounded to."""
        return self.values.dtype if self.scales is None else self.scales.dtype

    @property
    def bits(self) -> int:
        """8 or 4, or 16 for any floats."""
        return 16 if self.scales is None else 8 if self.values.dtype == torch.int8 else 4

    @property
    def by_input(self) -> bool:
        """Whether groups lie along the input dimension."""
        return self.scales is not None and self.scales.shape[1] == self.N

    @property
    def group_size(self) -> int:
        """Columns to a scale; of groups along the input, those packed together."""
        if self.scales is None:
            return 1
        return INPUT_GROUP_COLUMNS if self.by_input else self.N // self.scales.shape[1]

    @property
    def channels(self) -> int:
        """Channels to a scale, of groups along the input; 0 of others."""
        if self.scales is None or not self.by_input:
            return 0
        return self.values.shape[0] // self.scales.shape[0]

    def columns(self, begin: int, end: int) -> "Weight":
        """A part of it, of whole groups."""
        N = self.N
        parts = (None if t is None else t[:, begin * t.shape[1] // N : end * t.shape[1] // N] for t in self[:3])
        return Weight(*parts, refined=self.refined)  # type: ignore[misc, arg-type]  # the values are there


def packed_columns(values: Tensor) -> int:
    """How many weights a row of values holds."""
    return values.shape[1] * (NIBBLES if values.dtype == torch.int32 else 1)


def pack_int4(values: Tensor, group_size: int) -> Tensor:
    """Integers 0 to 15, any integer dtype [K, N] -> int32 [K, N/8]. N must be a multiple of group_size, that of 8."""
    K, N = values.shape
    nibbles = values.to(torch.int32).view(K, N // group_size, NIBBLES, group_size // NIBBLES)
    words = torch.zeros_like(nibbles[:, :, 0])
    for j in range(NIBBLES):
        words |= nibbles[:, :, j] << (4 * j)
    return words.reshape(K, N // NIBBLES)


def unpack_int4(words: Tensor, group_size: int) -> Tensor:
    """The inverse of pack_int4: uint8 [K, N]."""
    K = words.shape[0]
    grouped = words.view(K, -1, 1, group_size // NIBBLES)
    shifts = 4 * torch.arange(NIBBLES, dtype=torch.int32, device=words.device)[:, None]
    return (grouped >> shifts & 15).to(torch.uint8).reshape(K, -1)


def dequantize(values: Tensor, scales: Tensor, zeros: Tensor | None, refined: Tensor | None = None) -> Tensor:
    """The weight [K, N] that these tensors stand for, in the scales' dtype, rounded once from fp32."""
    weight = Weight(values, scales, zeros)
    rows, N, group_size = values.shape[0], weight.N, weight.group_size
    integers = values.float() if zeros is None else unpack_int4(values, group_size).float()
    shape = (scales.shape[0], -1, N) if weight.by_input else (rows, -1, group_size)
    across = 1 if weight.by_input else 2
    integers = integers.view(shape)
    if zeros is not None:
        integers = integers - zeros.float().unsqueeze(across)
    floats = (integers * scales.float().unsqueeze(across)).view(rows, N)
    if refined is not None:
        K = rows - len(refined)
        floats = floats[:K].index_add(0, refined.long(), floats[K:])
    return floats.to(scales.dtype)


def check_refined(refined: Tensor, K: int) -> None:
    """Raise ValueError unless refined lists channels below K in rising order. On a GPU this waits for it."""
    channels = refined.tolist()
    falling = next((i for i in range(1, len(channels)) if channels[i] <= channels[i - 1]), None)
    if falling is not None:
        raise ValueError(f"refined channel {channels[falling]} follows {channels[falling - 1]}: expected rising order")
    if channels and not 0 <= channels[0] <= channels[-1] < K:
        raise ValueError(f"refined channels are {channels[0]} to {channels[-1]}: expected 0 to {K - 1}")


def check_quantized(weight: Weight, K: int, segments: list[int] | None = None) -> None:
    """Raise ValueError unless weight is a quantized one [K, N] and segments, widths of columns, hold whole groups."""
    values, scales, zeros, refined = weight
    if refined is not None:
        if refined.dtype != torch.int32 or refined.dim() != 1 or refined.device != values.device:
            raise ValueError(f"refined is {refined.dtype} {tuple(refined.shape)}: expected int32 [E] beside values")
        if weight.bits != 4 or weight.by_input or not refined.is_contiguous():
            raise ValueError("refined channels: expected contiguous, of 4 bits with groups along the output")
    assert scales is not None
    rows = K + (0 if refined is None else refined.shape[0])
    if values.dim() != 2 or values.dtype not in (torch.int8, torch.int32) or values.shape[0] != rows:
        raise ValueError(f"values are {values.dtype} {tuple(values.shape)}: expected int8 or int32 [{rows}, ...]")
    is_matrix = scales.dim() == 2 and scales.is_floating_point() and scales.shape[1] > 0
    if not is_matrix or (scales.shape[0] != rows and not weight.by_input):
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}: expected floats [{rows}, groups]")
    if weight.by_input and (not scales.shape[0] or K % scales.shape[0]):
        raise ValueError(f"{scales.shape[0]} groups along the input: expected a divisor of {K}")
    if packed_columns(values) % scales.shape[1]:
        raise ValueError(f"{scales.shape[1]} groups do not divide {packed_columns(values)} columns")
    if (zeros is None) != (values.dtype == torch.int8):
        raise ValueError("zeros: expected with 4 bits, and not with 8")
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != scales.shape):
        raise ValueError(f"zeros are {zeros.dtype} {tuple(zeros.shape)}: expected uint8 {tuple(scales.shape)}")
    for tensor in (scales, zeros):
        if tensor is not None and tensor.device != values.device:
            raise ValueError(f"values are on {values.device}, scales or zeros on {tensor.device}: expected the same")
    if any(n % weight.group_size for n in segments or [weight.N]):
        raise ValueError(f"segments {segments or [weight.N]} are no multiples of the group size {weight.group_size}")
