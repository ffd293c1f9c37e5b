"""What the inline assembly of gather_tensor_core.py and lane_loads.py does, in numpy, for the interpreter on a CPU.

Each function is written from the PTX manual's description of the instructions and not from the assembly. What a lane
of mma.m16n8k16 holds is spelled out, so the test sees a wrong mapping of lanes to rows, columns and groups.
"""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from teal.kernels.gemv import gather_tensor_core as code
from teal.kernels.gemv import gather_tensor_core_rows as code_of_rows
from teal.kernels.gemv import gather_tensor_core_wide as code_of_wide
from teal.kernels.gemv import lane_loads, launch


def numbers(x: Any) -> np.ndarray:
    """The values of a tensor of the interpreter."""
    return np.asarray(x.handle.data)


def tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    """A tensor of the interpreter with these values."""
    return tl.core.tensor(TensorHandle(data, dtype), tl.block_type(dtype, [len(data)]))


def words(x: Any) -> np.ndarray:
    return numbers(x).astype(np.int32).view(np.uint32)


def read(addresses: Any, dtype: str, count: int = 1) -> np.ndarray:
    """count values at each address: [count, lanes]."""
    size = np.dtype(dtype).itemsize * count
    raw = [ctypes.string_at(int(a), size) for a in numbers(addresses)]
    return np.frombuffer(b"".join(raw), dtype).reshape(-1, count).T.copy()


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 to the 16 bits of the nearest bf16."""
    bits = x.astype(np.float32).view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def bf16_pair(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high bf16 of words, as fp32."""
    return (word << np.uint32(16)).view(np.float32), (word & np.uint32(0xFFFF0000)).view(np.float32)


def load_four(address: Any) -> tuple[tl.tensor, ...]:
    return tuple(tensor(row, tl.int32) for row in read(address, "<i4", 4))


def load_weights(address: Any, policy: Any) -> tuple[tl.tensor, ...]:
    return load_four(address)


def load_two(address: Any, policy: Any) -> tuple[tl.tensor, ...]:
    return tuple(tensor(row, tl.int32) for row in read(address, "<i4", 2))


def load_scale(address: Any, DTYPE: Any) -> tl.tensor:
    bits = read(address, "<u2")[0]
    is_bf16 = str(getattr(DTYPE, "value", DTYPE)) == "bf16"
    return tensor(
        (bits.astype(np.uint32) << 16).view(np.float32) if is_bf16 else bits.view(np.float16).astype(np.float32),
        tl.float32,
    )


def load_zero(address: Any) -> tl.tensor:
    return tensor(read(address, "u1")[0].astype(np.float32) + 128, tl.float32)


def address(base: Any, row: Any, size: Any) -> tl.tensor:
    return tensor(numbers(base) + numbers(row).astype(np.int64) * numbers(size).astype(np.int64), tl.int64)


def leave_first(lane: Any) -> tl.tensor:
    return tensor(np.zeros(len(numbers(lane)), np.int64), tl.int64)


def pair(low: Any, high: Any) -> tl.tensor:
    return tensor((bf16_bits(numbers(low)) | bf16_bits(numbers(high)) << np.uint32(16)).view(np.int32), tl.int32)


def exchange(x: Any, DISTANCE: Any) -> tl.tensor:
    data = numbers(x)
    return tensor(data[np.arange(len(data)) ^ int(getattr(DISTANCE, "value", DISTANCE))], tl.float32)


def from_lane(x: Any, lane: Any) -> tl.tensor:
    data = numbers(x)
    return tensor(data[np.arange(len(data)) // 32 * 32 + numbers(lane)], tl.float32)


def mma(a: np.ndarray, b: np.ndarray, c: list[np.ndarray]) -> list[np.ndarray]:
    """mma.m16n8k16 of one warp: a [4, 32] and b [2, 32] words of two bf16, c four [32]."""
    lane = np.arange(32)
    r, t = lane // 4, lane % 4
    A, B, C = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for register in range(4):
        for half, value in enumerate(bf16_pair(a[register])):
            A[r + 8 * (register % 2), 2 * t + half + 8 * (register // 2)] = value
    for register in range(2):
        for half, value in enumerate(bf16_pair(b[register])):
            B[2 * t + half + 8 * register, r] = value
    for register in range(4):
        C[r + 8 * (register // 2), 2 * t + register % 2] = c[register]
    D = A @ B + C
    return [D[r + 8 * (j // 2), 2 * t + j % 2].astype(np.float32) for j in range(4)]


def add_tile(sums: Any, w_0: Any, w_1: Any, w_2: Any, w_3: Any, b_0: Any, b_1: Any, BITS: Any) -> tuple[tl.tensor, ...]:
    rows = [words(w) for w in (w_0, w_1, w_2, w_3)]
    if int(getattr(BITS, "value", BITS)) == 8:
        rows = [row ^ np.uint32(0x80808080) for row in rows]
    b = np.stack([words(b_0), words(b_1)])
    found = [numbers(s).copy() for s in (sums.values if hasattr(sums, "values") else sums)]
    for warp in range(len(rows[0]) // 32):
        lanes = slice(32 * warp, 32 * warp + 32)
        for product in range(4):
            nibbles = [[bf16_bits(128.0 + (row[lanes] >> 4 * (2 * product + j) & 15)) for row in rows] for j in (0, 1)]
            a = [nibbles[j][2 * k] | nibbles[j][2 * k + 1] << np.uint32(16) for k in (0, 1) for j in (0, 1)]
            at = range(4 * product, 4 * product + 4)
            for j, d in zip(at, mma(np.stack(a), b[:, lanes], [found[j][lanes] for j in at]), strict=True):
                found[j][lanes] = d
    return tuple(tensor(s, tl.float32) for s in found)


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put these functions in place of the assembly, where there is no GPU to run it, and pretend that there is one."""
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(launch, "has_tensor_cores", lambda device: True)
    for module in (code, code_of_rows, code_of_wide, lane_loads):
        for name in ("load_two", "load_four", "load_weights", "load_scale", "load_zero", "address", "leave_first",
                     "pair", "exchange", "from_lane", "add_tile"):  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, globals()[name])
