"""AWQ and GPTQ checkpoints in Hugging Face layout: packed integers -> the floats they stand for, exactly.

Both have groups along the input dimension, a scale for each group and output; this project's integers have groups along
the output (kernels/packing.py), so their weights are held as floats. Layouts: those AutoAWQ ("gemm") and AutoGPTQ write.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import UserError

# AutoAWQ puts columns 0, 2, 4, 6, 1, 3, 5, 7 of eight into the nibbles 0 to 7 of a word.
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Packing:
    """How the projections of a checkpoint are packed; zero_offset is added to stored zero points."""

    method: str
    bits: int
    group_size: int
    zero_offset: int

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
        layout = str(raw.get("version", "gemm")).lower() if method == "awq" else raw.get("checkpoint_format", "gptq")
        known = ("gemm",) if method == "awq" else ("gptq", "gptq_v2")
        if layout not in known:
            raise UserError(f"{where}: {method} layout {layout!r} is not supported; expected {' or '.join(known)}")
        return cls(method, bits, group_size, zero_offset=int(layout == "gptq"))

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

    def weight(self, parts: dict[str, Tensor]) -> Tensor:
        """The weight [N, K], fp32, of these parts: scale * (integer - zero) of the group of each input."""
        if self.method == "awq":
            order = torch.tensor(AWQ_COLUMNS)
            values, zeros = (_unpacked(parts[name], 4, order) for name in ("qweight", "qzeros"))
            rows = torch.arange(values.shape[0])
            group = rows // (self.group_size if self.group_size > 0 else len(rows))
        else:
            in_order = torch.arange(32 // self.bits)
            values = _unpacked(parts["qweight"].t().contiguous(), self.bits, in_order).t()
            zeros = _unpacked(parts["qzeros"], self.bits, in_order)
            group = parts["g_idx"].long()  # of each input; in no order if the inputs were sorted by importance
        zeros = zeros + self.zero_offset
        scales = parts["scales"].float()
        return ((values - zeros[group]) * scales[group]).t()


def _unpacked(words: Tensor, bits: int, columns: Tensor) -> Tensor:
    """Words int32 [R, C] -> integers fp32 [R, C * 32/bits]; columns says which of a word's columns each place holds."""
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32)
    places = words[:, :, None] >> shifts & (1 << bits) - 1
    result = torch.empty_like(places)
    result[:, :, columns] = places
    return result.flatten(1).float()
