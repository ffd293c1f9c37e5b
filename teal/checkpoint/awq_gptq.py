"""AWQ and GPTQ checkpoints in Hugging Face layout: their integers repacked, or the floats they stand for.

Both have groups along the input dimension, and a scale for each group and output. The kernels take groups of
neighbouring channels, in 8 bits only with a zero in the middle (kernels/formats/packing.py). Such weights are
repacked; all others become floats. Both ways are exact but for the dtype of scales and floats.
Layouts: those that AutoAWQ ("gemm") and AutoGPTQ write.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teal.errors import UserError
from teal.kernels.formats.packing import INPUT_GROUP_COLUMNS, pack_int4

# AutoAWQ puts columns 0, 2, 4, 6, 1, 3, 5, 7 of eight into the nibbles 0 to 7 of a word.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
MIDDLE = 128  # the zero point of symmetric integers of 8 bits
LAYOUTS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}  # the first is meant where a config names none


@dataclass(frozen=True, slots=True)
class Packing:
    """How the projections of a checkpoint are packed.

    zero_offset is added to stored zero points, within bits. In gptq's first layout 15 stands for 0 (sym: false).
    symmetric: all zero points are the middle of the range.
    """

    method: str
    bits: int
    group_size: int
    zero_offset: int
    symmetric: bool

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> "Packing | None":
        """From config.json's quantization_config; None for a method that is neither. Raises UserError, naming where."""
        method = raw.get("quant_method")
        if method not in ("awq", "gptq"):
            return None
        bits, group_size = raw.get("bits", 4), raw.get("group_size", 128)
        if bits not in ((4,) if method == "awq" else (4, 8)):
            raise UserError(
                f"{where}: {method} with bits {bits!r} is not supported; expected 4{' or 8' * (method == 'gptq')}"
            )
        if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
            raise UserError(
                f"{where}: {method} group_size {group_size!r} is not usable; expected a positive number or -1"
            )
        layout, known = _layout(method, raw), LAYOUTS[method]
        if layout not in known:
            raise UserError(f"{where}: {method} layout {layout!r} is not supported; expected {' or '.join(known)}")
        if method == "awq" and not raw.get("zero_point", True):
            raise UserError(f"{where}: awq without zero points (zero_point false) is not supported; expected true")
        symmetric = method == "gptq" and bool(raw.get("sym", True))
        return cls(method, bits, group_size, int(layout == "gptq"), symmetric)

    def parts(self, N: int, K: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """What stands for a weight [N, K], by the end of its name: empty tensors of the shapes, on no device."""
        per_word = 32 // self.bits
        groups = 1 if self.group_size == -1 else -(-K // self.group_size)
        words: dict[str, tuple[int, ...]] = {"qzeros": (groups, N // per_word)}
        words["qweight"] = (K, N // per_word) if self.method == "awq" else (K // per_word, N)
        if self.method == "gptq":
            words["g_idx"] = (K,)
        shapes = {name: torch.empty(shape, dtype=torch.int32, device="meta") for name, shape in words.items()}
        return shapes | {"scales": torch.empty(groups, N, dtype=dtype, device="meta")}

    def can_be_repacked(self, N: int, K: int) -> bool:
        """Whether a weight [N, K] can, if its channels are in order."""
        return N % INPUT_GROUP_COLUMNS == 0 and K % self.channels(K) == 0

    def channels(self, K: int) -> int:
        """Neighbouring input channels to a scale, of K in all."""
        return K if self.group_size == -1 else self.group_size

    @property
    def deciding_parts(self) -> tuple[str, ...]:
        """Parts of a weight whose values decide whether it can be repacked."""
        return () if self.method == "awq" else ("g_idx",) if self.bits == 4 else ("g_idx", "qzeros")

    def allows(self, part: str, tensor: Tensor) -> bool:
        """Whether a weight with this deciding part can be repacked."""
        if part == "qzeros":
            return bool((self._zeros(tensor, torch.arange(4)) == MIDDLE).all())
        # The group of each input channel: not that of its place where they were sorted by importance.
        return torch.equal(tensor.long(), torch.arange(len(tensor)) // self.channels(len(tensor)))

    def repacked(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """values, scales, zeros of a weight [K, N] with groups along the input (kernels/formats/packing.py)."""
        values, zeros = self._integers(parts)
        if self.bits == 8:
            return (values - MIDDLE).to(torch.int8), parts["scales"], None
        return pack_int4(values, INPUT_GROUP_COLUMNS), parts["scales"], zeros.to(torch.uint8)

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The weight [N, K], fp32, of these parts: scale * (integer - zero) of the group of each input.

        Raises UserError if a group is named that is not there.
        """
        values, zeros = self._integers(parts)
        K = len(values)
        group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(K) // self.channels(K)
        if group.min() < 0 or group.max() >= len(zeros):
            raise UserError(f"g_idx names groups {int(group.min())} to {int(group.max())}; there are {len(zeros)}")
        return ((values.float() - zeros[group]) * parts["scales"].float()[group]).t()

    def _integers(self, parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of a weight [K, N] and of its zero points [groups, N]."""
        order = torch.tensor(AWQ_COLUMNS) if self.method == "awq" else torch.arange(32 // self.bits)
        zeros = self._zeros(parts["qzeros"], order)
        if self.method == "awq":
            return _unpacked(parts["qweight"], self.bits, order), zeros
        return _unpacked(parts["qweight"].t().contiguous(), self.bits, order).t(), zeros

    def _zeros(self, qzeros: Tensor, order: Tensor) -> Tensor:
        """Zero points int32 [groups, N], each in the range of bits, of packed ones; order as in _unpacked."""
        stored = _unpacked(qzeros, self.bits, order)
        middle = 1 << self.bits - 1
        if self.symmetric and (stored == middle).all():
            return stored  # GPTQModel 5 writes "gptq" and stores them as gptq_v2 does: less one means another file
        return stored + self.zero_offset & (1 << self.bits) - 1


def _layout(method: str, raw: dict[str, Any]) -> str:
    """The packed layout that a quantization_config names, under one of the keys that writers have used for it."""
    if raw.get("is_marlin_format"):
        return "marlin"
    if raw.get("backend") == "llm-awq":  # whose words hold other columns
        return "llm-awq"
    keys = ("version", "checkpoint_format", "format") if method == "awq" else ("checkpoint_format", "format")
    named = (str(raw[key]).lower() for key in keys if raw.get(key) is not None)
    return next(named, LAYOUTS[method][0])


def _unpacked(words: Tensor, bits: int, columns: Tensor) -> Tensor:
    """Words int32 [R, C] -> integers int32 [R, C * 32/bits]; columns: which of a word's columns a place holds."""
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
    places = words[:, :, None] >> shifts & (1 << bits) - 1
    result = torch.empty_like(places)
    result[:, :, columns] = places
    return result.flatten(1)
