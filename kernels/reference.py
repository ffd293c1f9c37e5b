"""Plain fp32 definitions of the operations in this folder: slow, obvious, and what tests compare against."""

import torch
from torch import Tensor


def sparse_linear_reference(x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int]) -> Tensor:
    """Each column segment of x @ weight, with entries |x| below the segment's threshold taken as 0.

    x [B, K], weight [K, N], thresholds [J], segments: J widths that add up to N.
    Returns fp32 [B, N].
    """
    outputs = []
    for threshold, columns in zip(thresholds.to(x.dtype), weight.float().split(segments, dim=1), strict=True):
        kept = torch.where(x.abs() < threshold, 0, x).float()
        outputs.append(kept @ columns)
    return torch.cat(outputs, dim=1)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with the model's roundings: x [..., K] -> [..., K] in weight's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(weight.dtype) * weight


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm in fp32, rounded once to weight's dtype: x [..., K] -> [..., K]."""
    x32 = x.float() - x.float().mean(-1, keepdim=True)
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float() + bias.float()).to(weight.dtype)


def silu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in fp32, rounded once to their dtype."""
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def gelu_tanh_reference(gate: Tensor, up: Tensor) -> Tensor:
    """As silu_reference, with x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) in place of silu(x)."""
    x = gate.float()
    return (x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) * up.float()).to(gate.dtype)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, D] rotated by cos, sin fp32 [B, D/2]; channel i pairs with i + D/2."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, window: int, softcap: float = 0.0
) -> Tensor:  # fmt: skip
    """fp32 softmax(q k^T / sqrt(D)) v of q [B, H, D] over the positions up to each row's own, [B, H, D].

    Scores become softcap * tanh(scores / softcap), unless that is 0.
    """
    B, H, D = q.shape
    KV, S = k_cache.shape[1], k_cache.shape[2]
    k, v = (cache.float().repeat_interleave(H // KV, dim=1) for cache in (k_cache, v_cache))  # [B, H, S, D]
    behind = positions.view(B, 1, 1) - torch.arange(S, device=q.device)
    allowed = (behind >= 0) & ((behind < window) if window else True)
    scores = torch.einsum("bhd,bhsd->bhs", q.float(), k) / D**0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", weights, v.masked_fill(~allowed[..., None], 0.0))
