"""Rotary embeddings: each pair of a head's channels turns with the position, at a speed of its own."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RopeKind = Literal["global", "local", "none"]  # which rotation a layer has
KINDS = ("linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How frequencies are changed for longer texts.

    kind: "linear" divides positions by factor. "llama3" does so by wavelength, "yarn" by channel (Peng et al. 2023,
    arXiv 2309.00071, section 3.2). "longrope" divides each channel by its own of factors (Ding et al. 2024, arXiv
    2402.13753). The last two multiply cos and sin by attention_factor.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0  # turns over the original length: pairs with more keep their frequency
    beta_slow: float = 1.0  # those with fewer are divided by factor
    truncate: bool = True  # whether the channels between which yarn interpolates are whole numbers
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()  # of each pair of channels

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope scaling kind {self.kind!r}: expected one of {', '.join(KINDS)}")


def frequencies(
    head_dim: int, turned: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:  # fmt: skip
    """Rotation per position of each pair of a head's channels, radians: fp32 [D/2] (Su et al. 2021, section 3.2.2).

    Of the D channels of a head only so many are turned, half of them at its start and half behind its middle. The
    other pairs have frequency 0.
    """
    freqs = _turned_frequencies(turned, theta, scaling, device)
    return freqs if turned == head_dim else F.pad(freqs, (0, (head_dim - turned) // 2))


def rope_angles(
    positions: Tensor, head_dim: int, turned: int, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, D/2] of the angles at positions int64 [B, T]; parameters as of frequencies."""
    freqs = frequencies(head_dim, turned, theta, scaling, positions.device)
    angles = positions[:, :, None, None].float() * freqs
    if scaling is None or scaling.attention_factor == 1 or turned == 0:
        return angles.cos(), angles.sin()
    factors = angle_factors(freqs, scaling)
    return angles.cos() * factors, angles.sin() * factors


def angle_factors(freqs: Tensor, scaling: RopeScaling | None) -> Tensor:
    """By what cos and sin of pairs with these frequencies are multiplied: 1 where a pair does not turn."""
    return torch.where(freqs > 0, 1.0 if scaling is None else scaling.attention_factor, 1.0)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, heads, D] by cos, sin [B, T, 1, D/2]; channel i pairs with i + D/2 (the HF weight layout)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _turned_frequencies(dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Of dim channels that are all turned: fp32 [dim/2]."""
    exponents = torch.arange(0, dim, 2, device=device).float() / max(dim, 1)
    freqs = 1.0 / theta**exponents
    if scaling is None or dim == 0:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    if scaling.kind == "longrope":
        return freqs / torch.tensor(scaling.factors, device=device)
    keep = _kept_by_yarn(dim, theta, scaling, device) if scaling.kind == "yarn" else _kept_by_llama3(freqs, scaling)
    return (1 - keep) * freqs / scaling.factor + keep * freqs


def _kept_by_llama3(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long wavelengths are divided by factor, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / freqs
    turns = scaling.original_max_position_embeddings / wavelengths
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return keep.clamp(0, 1)


def _kept_by_yarn(dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """From 1 at the pair that turns beta_fast times over the original length to 0 at beta_slow, linear between."""

    def pair(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    return 1 - ((torch.arange(dim // 2, device=device).float() - low) / width).clamp(0, 1)
