"""Where to spend sparsity: over all projections of all layers, so that their errors add up to the least.

Errors of different projections add up to second order, and each falls off its own way. At the least sum, one more
weight dropped costs the same everywhere: the condition of a Lagrange multiplier on the number of weights kept. Each
error curve is replaced by its lower convex hull, whose segments are then taken in order of cost a weight.
"""

import itertools
from collections.abc import Mapping, Sequence

from teal.errors import UserError

Curve = Sequence[tuple[float, float]]  # (sparsity, error), sparsities rising from 0


def allocate(curves: Sequence[Curve], sizes: Sequence[int], target: float) -> list[float]:
    """A sparsity for each curve, such that the share target of all weights is dropped, at the least sum of errors.

    sizes: weights of each. Raises UserError for a target beyond the last points of the curves.
    """
    total = sum(sizes)
    most = sum(curve[-1][0] * size for curve, size in zip(curves, sizes, strict=True)) / total
    if target > most + 1e-9:
        raise UserError(f"sparsity {target} cannot be reached: no projection goes beyond {curves[0][-1][0]:g}")
    segments = []  # (error a weight, which curve, weights)
    for i, (curve, size) in enumerate(zip(curves, sizes, strict=True)):
        hull = convex_hull(curve)
        for (p, error), (q, more) in itertools.pairwise(hull):
            segments.append(((more - error) / ((q - p) * size), i, (q - p) * size))
    dropped = [0.0] * len(curves)
    left = target * total
    for _, i, weights in sorted(segments):  # a hull's own segments rise, so they come in their order
        taken = min(weights, left)
        dropped[i] += taken
        left -= taken
        if left <= 0:
            break
    return [weights / size for weights, size in zip(dropped, sizes, strict=True)]


def allocate_by_layer(
    curves: Sequence[Mapping[str, Curve]], sizes: Sequence[Mapping[str, int]], target: float
) -> list[dict[str, float]]:
    """As allocate, for curves and sizes [layer][projection]."""
    places = [(i, name) for i, layer in enumerate(curves) for name in layer]
    shares = allocate([curves[i][name] for i, name in places], [sizes[i][name] for i, name in places], target)
    found: list[dict[str, float]] = [{} for _ in curves]
    for (i, name), share in zip(places, shares, strict=True):
        found[i][name] = share
    return found


def convex_hull(curve: Curve) -> list[tuple[float, float]]:
    """The points of the lower convex hull of a curve (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x, y in curve:
        while len(hull) >= 2 and _is_above(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def _is_above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b is on or above the line from a to c."""
    return (b[0] - a[0]) * (c[1] - a[1]) <= (c[0] - a[0]) * (b[1] - a[1])
