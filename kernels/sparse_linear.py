"""x @ weight where small |x| count as zero, and on a CPU the weight rows they would meet are never read.

Layout: weight is input-channel-major [K, N], so one dropped entry of x skips one contiguous row.
On a CPU the kept rows are gathered and summed by `embedding_bag`, whose FBGEMM kernel streams each
row once with prefetching and accumulates in fp32; the kept rows of one output are dealt to as many
bags as there are threads. Each bag is summed by one thread in row order and the bags are then added
in order, so the same thread count gives the same bits.
"""

import torch
from torch import Tensor

# With more rows of x a weight row is kept by nearly some of them and one dense product is faster:
# measured on 2 Zen 4 cores, 1536 x 3072 bf16 at 50%: 398 against 966 us (1 row), 722/958 (4), 987/897 (8).
MAX_GATHER_ROWS = 4
MODE_SUM = 0  # torch.embedding_bag's code; the functional wrapper would cost 5 us more a call


@torch.library.custom_op("teal::sparse_linear", mutates_args=())
def sparse_linear(x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int]) -> Tensor:
    """Each column segment of x @ weight, with entries |x| below the segment's threshold taken as 0.

    x [B, K] and weight [K, N] of one dtype (bf16, fp16 or fp32) and device; thresholds fp32 [J],
    rounded to x's dtype before they are compared; segments: J widths that add up to N. Returns
    [B, N] in x's dtype. Raises ValueError on a mismatch.
    """
    _check(x, weight, thresholds, segments)
    gather = x.device.type == "cpu" and x.shape[0] <= MAX_GATHER_ROWS
    product = _row_gather if gather else _masked_product
    thresholds = thresholds.to(x.dtype)
    if len(segments) == 1:
        return product(x, weight, thresholds[0])
    columns = weight.split(segments, dim=1)
    return torch.cat([product(x, w, t) for w, t in zip(columns, thresholds, strict=True)], dim=1)


@sparse_linear.register_fake
def _(x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _check(x: Tensor, weight: Tensor, thresholds: Tensor, segments: list[int]) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: expected [B, K] and [K, N]")
    if x.dtype != weight.dtype or x.device != weight.device or thresholds.device != x.device:
        raise ValueError(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}: expected the same")
    if weight.stride(1) != 1:
        raise ValueError(f"weight has strides {weight.stride()}: its rows must be contiguous")
    if thresholds.shape != (len(segments),) or sum(segments) != weight.shape[1]:
        raise ValueError(
            f"segments {segments} with {thresholds.numel()} thresholds do not cover {weight.shape[1]} columns"
        )


def _masked_product(x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    return x.where(x.abs() >= threshold, 0) @ weight


def _row_gather(x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """As _masked_product, reading only kept rows. Every line here costs its microseconds 120 times a token."""
    rows, width = x.shape
    flat = x.reshape(-1)
    kept = flat.abs() >= threshold.item()
    channels = kept.nonzero().view(-1)
    values = flat.index_select(0, channels)
    bags = max(1, torch.get_num_threads() // rows)  # per row of x
    if rows == 1:
        offsets = torch.tensor([channels.shape[0] * i // bags for i in range(bags)])
    else:
        counts = kept.view(rows, width).sum(dim=1)
        starts = counts.cumsum(0) - counts
        offsets = (starts[:, None] + counts[:, None] * torch.arange(bags) // bags).view(-1)
        channels = channels % width
    partials = torch.embedding_bag(weight, channels, offsets, False, MODE_SUM, False, values)[0]
    return partials if bags == 1 else partials.view(rows, bags, -1).sum(dim=1)
