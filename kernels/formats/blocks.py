"""Weights of GGUF's block types, exactly as their files round them, in the layout of the CPU's products.

A weight is scale * (integer - offset) + minimum. Scale and minimum belong to 32 (16 of Q6_K) neighbouring input
channels and one output. Files hold outputs as rows. Here rows are input channels, so that one which is not read is
skipped. A weight [K, N] is one array of bytes, its parts one after the other. Columns are padded to whole strips of
128, by zeros.

    values       [K, bits/8 x columns]       integers without a sign
    scales       [K/group, columns]          fp16; of K-quants int8, times the super-scale
    minima       [K/32, columns]             likewise, if the type has any
    super-scales [K/256, columns]            fp16, of K-quants
    super-minima [K/256, columns]            likewise; they count as negative

K-quants keep both parts: 4.6 bits for each weight of Q4_K. Their product needs fp32, and 6 bits a weight.

A row of values begins with the low four bits (of 8 bits with all eight). 64 bytes are a strip of 128 columns. Byte p
holds columns c and 64 + c in its low and high bits, or with 8 bits column c of a half strip. Where p is 16 a + 4 b + d,
c is 16 b + 4 a + d. The bytes of four rows, interleaved within 128 bits, then stand in the order of columns.

    byte       0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12 13 14 15 | 16 17 18 19 | ...
    column     0  1  2  3 | 16 17 18 19 | 32 33 34 35 | 48 49 50 51 |  4  5  6  7 | ...

Higher bits follow for all columns. With low and high halves of a strip's bytes called a and b:

    5 bits    16 bytes a strip    byte j: bit i belongs to a[j + 16 i], bit 4 + i to b[j + 16 i]
    6 bits    32 bytes a strip    byte j: two bits each of a[j], a[j + 32], b[j], b[j + 32]
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

STRIP = 128  # columns
SUPER = 256  # channels to a super-scale
MIN_GROUP = 32  # channels to a minimum
ROWS_AT_ONCE = 8192  # of a file's tensor, of whole strips: bounds memory
# Bytes of a file's block, of 32 weights or, nested, 256.
FILE_BLOCKS = {
    "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockType:
    """What a type's integers mean. nested: scales and minima are integers, times a super-scale."""

    bits: int
    offset: int = 0
    group: int = 32
    has_minima: bool = False
    nested: bool = False


BLOCK_TYPES = {
    "Q4_0": BlockType(4, offset=8),
    "Q4_1": BlockType(4, has_minima=True),
    "Q5_0": BlockType(5, offset=16),
    "Q5_1": BlockType(5, has_minima=True),
    "Q8_0": BlockType(8, offset=128),
    "Q4_K": BlockType(4, has_minima=True, nested=True),
    "Q5_K": BlockType(5, has_minima=True, nested=True),
    "Q6_K": BlockType(6, offset=32, group=16, nested=True),
}


class Blocks(NamedTuple):
    """A weight [K, N] of a type in BLOCK_TYPES: its bytes, uint8 [size]."""

    kind: str
    K: int
    N: int
    data: Tensor

    @property
    def type(self) -> BlockType:
        return BLOCK_TYPES[self.kind]


class Parts(NamedTuple):
    """A weight's integers uint8 [K, N], and scales and minima fp32: [K/group, N] and [K/32, N], or None."""

    integers: Tensor
    scales: Tensor
    minima: Tensor | None


def padded_columns(N: int) -> int:
    """N, up to whole strips."""
    return -(-N // STRIP) * STRIP


def _sections(kind: str, K: int, N: int) -> list[tuple[int, int, torch.dtype]]:
    """(rows, columns, dtype) of values, scales, minima, super-scales, super-minima; no rows of what there is not."""
    found, columns = BLOCK_TYPES[kind], padded_columns(N)
    of_group = torch.int8 if found.nested else torch.float16
    supers = K // SUPER if found.nested else 0
    return [
        (K, columns * found.bits // 8, torch.uint8),
        (K // found.group, columns, of_group),
        (K // MIN_GROUP if found.has_minima else 0, columns, of_group),
        (supers, columns, torch.float16),
        (supers if found.has_minima else 0, columns, torch.float16),
    ]


def size_of(kind: str, K: int, N: int) -> int:
    """Bytes of a weight. Raises ValueError if its channels are no whole blocks."""
    block = SUPER if BLOCK_TYPES[kind].nested else MIN_GROUP
    if K % block or K <= 0 or N <= 0:
        raise ValueError(f"a {kind} weight has {K} channels and {N} outputs: expected whole blocks of {block}")
    return sum(rows * columns * dtype.itemsize for rows, columns, dtype in _sections(kind, K, N))


def sections(weight: Blocks) -> list[Tensor]:
    """values, scales, minima, super-scales and super-minima of a weight: views [rows, columns] of its bytes."""
    kind, K, N, data = weight
    if data.dtype != torch.uint8 or data.shape != (size_of(kind, K, N),) or not data.is_contiguous():
        raise ValueError(f"data is {data.dtype} {tuple(data.shape)}: expected uint8 [{size_of(kind, K, N)}]")
    found, begin = [], 0
    for rows, columns, dtype in _sections(kind, K, N):
        end = begin + rows * columns * dtype.itemsize
        found.append(data[begin:end].view(dtype).view(rows, columns))
        begin = end
    return found


def empty(kind: str, K: int, N: int) -> Blocks:
    """A weight whose bytes are zeros."""
    return Blocks(kind, K, N, torch.zeros(size_of(kind, K, N), dtype=torch.uint8))


def pack(kind: str, rows: Tensor) -> Blocks:
    """The weight of a GGUF tensor's rows of blocks, uint8 [N, bytes of a row]."""
    K = rows.shape[1] // FILE_BLOCKS[kind] * (SUPER if BLOCK_TYPES[kind].nested else MIN_GROUP)
    weight = empty(kind, K, len(rows))
    values, *others = sections(weight)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        integers, *parts = _unpack_file(kind, rows[begin : begin + ROWS_AT_ONCE])
        _pack_values(integers.t(), weight.type.bits, _planes(values, weight.type.bits, begin, len(integers)))
        for part, section in zip(parts, others, strict=True):
            if part is not None:
                section[:, begin : begin + len(part)] = part.t()
    return weight


def unpack(weight: Blocks) -> Parts:
    """The inverse of pack, with scales and minima as floats: exact, but for the products of K-quants, rounded once."""
    values, scales, minima, supers, super_minima = sections(weight)
    N, found = weight.N, weight.type
    integers = _unpack_values(values, found.bits, N)
    scales, minima = scales[:, :N].float(), minima[:, :N].float()
    if found.nested:
        scales = scales * supers[:, :N].float().repeat_interleave(SUPER // found.group, 0)
        minima = (
            -minima * super_minima[:, :N].float().repeat_interleave(SUPER // MIN_GROUP, 0) if len(minima) else minima
        )
    return Parts(integers, scales, minima if found.has_minima else None)


def dequantize(weight: Blocks) -> Tensor:
    """The weight fp32 [K, N], as the gguf package computes it."""
    integers, scales, minima = unpack(weight)
    found = weight.type
    floats = (integers.float() - found.offset) * scales.repeat_interleave(found.group, 0)
    return floats if minima is None else floats + minima.repeat_interleave(MIN_GROUP, 0)


def column(weight: Blocks, n: int) -> Tensor:
    """Column n of dequantize, fp32 [K]: an output's weights, or a token's vector in an embedding. Raises ValueError."""
    if not 0 <= n < weight.N:
        raise ValueError(f"column {n}: expected 0 to {weight.N - 1}")
    begin = n // STRIP * STRIP
    return dequantize(columns(weight, begin, n + 1))[:, n - begin]


def columns(weight: Blocks, begin: int, end: int) -> Blocks:
    """A copy of a weight's columns begin to end. Raises ValueError if begin is not a multiple of STRIP."""
    if begin % STRIP:
        raise ValueError(f"begin is {begin}: expected a multiple of {STRIP}")
    parts, last = sections(weight), begin + padded_columns(end - begin)
    cut = [torch.cat(_planes(parts[0], weight.type.bits, begin, end - begin), 1)]
    cut += [part[:, begin:last] for part in parts[1:]]
    data = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in cut])
    return Blocks(weight.kind, weight.K, end - begin, data)


# Values


def _planes(values: Tensor, bits: int, begin: int, count: int) -> list[Tensor]:
    """Of a section of values, where strips from column begin on have their low bits, and their high ones if apart."""
    first, last = begin // STRIP, -(-(begin + count) // STRIP)
    widths = [(0, STRIP * max(4, bits // 8 * 8) // 8)]
    if bits in (5, 6):
        widths.append((values.shape[1] * 4 // bits, STRIP * (bits - 4) // 8))
    return [values[:, start + first * width : start + last * width] for start, width in widths]


def _pack_values(integers: Tensor, bits: int, planes: list[Tensor]) -> None:
    """Integers uint8 [K, N] into planes of whole strips."""
    K, N = integers.shape
    columns = padded_columns(N)
    halves = torch.zeros(K, columns // 64, 64, dtype=torch.uint8)
    halves.view(K, columns)[:, :N] = integers
    halves = halves.view(K, -1, 4, 4, 4).transpose(2, 3).reshape(K, -1, 64)  # columns (b, a, d) -> bytes (a, b, d)
    if bits == 8:
        planes[0].copy_(halves.flatten(1))
        return
    a, b = halves[:, ::2], halves[:, 1::2]  # [K, strips, 64]
    planes[0].copy_((a & 15 | b << 4).flatten(1))
    if bits > 4:
        width = bits - 4
        parts = (8 // width // 2, 16 * width)  # of 64 bytes that share one byte's bits
        places = torch.cat(((a >> 4).unflatten(2, parts), (b >> 4).unflatten(2, parts)), 2)
        bytes_ = torch.zeros_like(places[:, :, 0])
        for i in range(places.shape[2]):
            bytes_ |= places[:, :, i] << width * i
        planes[1].copy_(bytes_.flatten(1))


def _unpack_values(values: Tensor, bits: int, N: int) -> Tensor:
    """Integers uint8 [K, N] of a section of values."""
    K, columns = len(values), padded_columns(N)
    if bits == 8:
        halves = values.view(K, -1, 64)
    else:
        low = values[:, : columns // 2].unflatten(1, (-1, 64))
        pair = torch.stack((low & 15, low >> 4), 2)  # [K, strips, 2, 64]
        if bits > 4:
            width = bits - 4
            high = values[:, columns // 2 :].unflatten(1, (-1, 1, 16 * width))
            shifts = width * torch.arange(8 // width, dtype=torch.uint8)[:, None]
            pair = pair | ((high >> shifts & (1 << width) - 1) << 4).view(pair.shape)
        halves = pair.view(K, -1, 64)
    return halves.view(K, -1, 4, 4, 4).transpose(2, 3).reshape(K, columns)[:, :N]


# Files: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h


def _unpack_file(kind: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Integers uint8 [N, K], scales [N, K/group], minima [N, K/32], super-scales and super-minima [N, K/256]."""
    found = BLOCK_TYPES[kind]
    if found.nested:
        return _unpack_k_quant(kind, rows)
    high = 4 if found.bits == 5 else 0
    scales = 4 if found.has_minima else 2
    blocks = rows.unflatten(1, (-1, FILE_BLOCKS[kind]))
    floats = blocks[:, :, :scales].contiguous().view(torch.float16)  # [N, blocks, 1 or 2]
    q = blocks[:, :, scales + high :]
    q = q ^ 128 if found.bits == 8 else torch.cat((q & 15, q >> 4), 2)
    if high:
        shifts = torch.arange(8, dtype=torch.uint8)
        bits = (blocks[:, :, scales : scales + 4, None] >> shifts & 1).flatten(2)  # of 32 integers
        q = q | bits << 4
    return q.flatten(1), floats[:, :, 0], floats[:, :, 1] if found.has_minima else None, None, None


def _unpack_k_quant(kind: str, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As _unpack_file, of Q4_K, Q5_K and Q6_K."""
    if kind == "Q6_K":
        blocks = rows.unflatten(1, (-1, FILE_BLOCKS[kind]))
        low, high = blocks[:, :, :128].unflatten(2, (2, 64)), blocks[:, :, 128:192].unflatten(2, (2, 32))
        low = torch.cat((low & 15, low >> 4), 3)  # [N, blocks, 2, 128]
        high = torch.cat([high >> 2 * i & 3 for i in range(4)], 3)
        scales = blocks[:, :, 192:208].contiguous().view(torch.int8)
        supers = blocks[:, :, 208:].contiguous().view(torch.float16)[:, :, 0]
        return (low | high << 4).flatten(1), scales.flatten(1), None, supers, None
    blocks = rows.unflatten(1, (-1, FILE_BLOCKS[kind]))
    floats = blocks[:, :, :4].contiguous().view(torch.float16)
    packed = blocks[:, :, 4:16]  # scales and minima of 6 bits
    first, second, last = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scales = torch.cat((first & 63, last & 15 | first >> 6 << 4), 2).view(torch.int8)
    minima = torch.cat((second & 63, last >> 4 | second >> 6 << 4), 2).view(torch.int8)
    q = blocks[:, :, -128:].unflatten(2, (4, 32))
    q = torch.stack((q & 15, q >> 4), 3).flatten(2)  # 8 groups of 32
    if kind == "Q5_K":
        high = blocks[:, :, 16:48]
        q = q | (torch.cat([high >> i & 1 for i in range(8)], 2) << 4)
    return q.flatten(1), scales.flatten(1), minima.flatten(1), floats[:, :, 0], floats[:, :, 1]
