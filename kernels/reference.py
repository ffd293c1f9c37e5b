"""Plain fp32 definitions of the operations in this folder: slow, obvious, and what tests compare against."""

import torch
from torch import Tensor


def sparse_linear_reference(x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int]) -> Tensor:
    """Each column segment of x @ weight, with entries |x| below the segment's threshold taken as 0.

    x [B, K], weight [K, N], thresholds [J] or, one for each channel, [J, K], segments: J widths that add up to N.
    Returns fp32 [B, N].
    """
    outputs = []
    for threshold, columns in zip(thresholds.to(x.dtype), weight.float().split(segments, dim=1), strict=True):
        kept = torch.where(x.abs() < threshold, 0, x).float()
        outputs.append(kept @ columns)
    return torch.cat(outputs, dim=1)
