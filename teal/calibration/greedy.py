"""TEAL's block-wise greedy allocation (Algorithm 1 of arXiv 2408.14690): which projections of a block to make sparser.

Starting dense, one projection at a time is made sparser: always the one whose step adds least to the error of the
block's output. It ends when the block as a whole, weighted by memory, reaches the target. Steps are of equal memory: a
projection with twice the weights moves half as far.
"""

import heapq
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from teal.errors import UserError

MAX_SPARSITY = 0.95  # of one projection: thresholds far in the tail rest on few samples


def greedy_sparsities(
    error: Callable[[dict[str, float]], float],
    sizes: dict[str, int],
    targets: list[float],
    step: float,
) -> list[dict[str, float]]:
    """The sparsity of each projection for every target, in the order of targets.

    error maps sparsities to the L2 error of the block's output; sizes are weight counts; step is the average
    over projections of one step. A projection's error increase is computed again only when the last known one is
    the least. Increases hardly shrink while others grow: this finds what Algorithm 1 finds, in a third of the
    evaluations. Raises UserError for a target that cannot be reached.
    """
    check_targets(targets)
    total = sum(sizes.values())
    share = step / len(sizes)  # of the block's memory that one step drops
    steps = {name: share * total / size for name, size in sizes.items()}
    current = dict.fromkeys(sizes, 0.0)
    base = 0.0  # squared error of current
    found: dict[float, dict[str, float]] = {}

    def increase(name: str) -> float:
        return error(current | {name: _raised(current[name], steps[name])}) ** 2 - base

    queue = [(increase(name), name) for name in sizes]
    heapq.heapify(queue)
    for target in sorted(set(targets)):
        while (reached := _block_sparsity(current, sizes)) < target - 1e-9:
            added, best = _least(queue, increase)
            gain = (_raised(current[best], steps[best]) - current[best]) * sizes[best] / total
            if reached + gain > target:  # this target ends within the step; the next one starts before it
                part = current[best] + (target - reached) * total / sizes[best]
                found[target] = current | {best: part}
                heapq.heappush(queue, (added, best))
                break
            current[best] = _raised(current[best], steps[best])
            base += added
            if current[best] < MAX_SPARSITY:
                heapq.heappush(queue, (increase(best), best))
        found.setdefault(target, dict(current))
    return [found[target] for target in targets]


def block_error(output: Tensor, expected: Tensor, x: Tensor) -> float:
    """The L2 error of a block's output [B, T, C], with no token's part out of proportion to what the block adds to it.

    expected is the dense output and x the input, of the same shape. A token's squared error is divided by the squared
    norm of expected - x, or by its median over tokens where that is larger. The paper's error divides by nothing. In
    some models a few tokens, mostly the first, have activations hundreds of times the others' (Sun et al. 2024,
    arXiv 2402.17762). In the blocks that add them and take them away, these tokens are then nearly the whole error.
    """
    added = _squared_norms(expected - x)
    scale = added.clamp(min=max(float(added.median()), torch.finfo(added.dtype).tiny))
    return float((_squared_norms(output - expected) / scale).sum().sqrt())


def _squared_norms(x: Tensor) -> Tensor:
    """[..., C] -> fp32 [...]."""
    return x.float().square().sum(dim=-1)


def check_targets(targets: Iterable[float]) -> None:
    """Raise UserError for a target that cannot be reached, however sparsity is spread."""
    if (most := max(targets)) > MAX_SPARSITY:
        raise UserError(f"sparsity {most} cannot be reached: no projection goes beyond {MAX_SPARSITY}")


def _raised(sparsity: float, step: float) -> float:
    return min(sparsity + step, MAX_SPARSITY)


def _block_sparsity(sparsities: dict[str, float], sizes: dict[str, int]) -> float:
    return sum(sparsities[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _least(queue: list[tuple[float, str]], increase: Callable[[str], float]) -> tuple[float, str]:
    """Pop the projection with the least increase from the queue, with that increase."""
    while True:
        _, name = heapq.heappop(queue)
        now = increase(name)
        if not queue or now <= queue[0][0]:
            return now, name
        heapq.heappush(queue, (now, name))
