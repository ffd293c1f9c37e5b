"""The global allocation on error curves whose best answer is known."""

import itertools
import random

import pytest

from teal.calibration.allocation import allocate, convex_hull
from teal.errors import UserError

GRID = [i / 20 for i in range(20)]
SIZES = [16, 4, 4, 16, 56, 56, 56]


def curves(seed: int) -> list[list[tuple[float, float]]]:
    generator = random.Random(seed)
    return [[(p, c * p**e) for p in GRID] for c, e in (
        (generator.uniform(0.1, 4), generator.uniform(1.5, 4)) for _ in SIZES
    )]  # fmt: skip


def error_at(curve: list[tuple[float, float]], p: float) -> float:
    """The curve, linear between its points."""
    for (a, low), (b, high) in itertools.pairwise(curve):
        if p <= b + 1e-12:
            return low + (high - low) * (p - a) / (b - a)
    raise AssertionError(p)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.93])
def test_no_exchange_between_two_makes_the_sum_less(seed: int, target: float) -> None:
    given = curves(seed)
    found = allocate(given, SIZES, target)
    total = sum(SIZES)
    assert sum(p * size for p, size in zip(found, SIZES, strict=True)) / total == pytest.approx(target, abs=1e-12)
    best = sum(error_at(c, p) for c, p in zip(given, found, strict=True))
    for i in range(len(SIZES)):
        for j in range(len(SIZES)):
            moved = list(found)
            moved[i] += 0.01 / SIZES[i]
            moved[j] -= 0.01 / SIZES[j]
            if i != j and moved[i] <= GRID[-1] and moved[j] >= 0:
                assert sum(error_at(c, p) for c, p in zip(given, moved, strict=True)) >= best - 1e-12


def test_a_curve_that_falls_back_is_taken_by_its_hull() -> None:
    assert convex_hull([(0.0, 0.0), (0.1, 3.0), (0.2, 1.0), (0.3, 1.5), (0.4, 2.0)]) == [(0, 0), (0.4, 2.0)]
    assert convex_hull([(0.0, 0.0), (0.1, 0.1), (0.2, 0.5)]) == [(0.0, 0.0), (0.1, 0.1), (0.2, 0.5)]


def test_what_costs_more_is_made_less_sparse() -> None:
    low, high = allocate([[(p, p * p) for p in GRID], [(p, 9 * p * p) for p in GRID]], [10, 10], 0.5)
    assert low == pytest.approx(0.9, abs=0.051) and low + high == pytest.approx(1.0)


def test_a_target_beyond_all_curves_is_refused() -> None:
    with pytest.raises(UserError, match=r"sparsity 0.97 cannot be reached: no projection goes beyond 0.95"):
        allocate(curves(0), SIZES, 0.97)
