"""The greedy allocation on error functions whose best answer is known."""

import random
from collections.abc import Callable

import pytest

from teal.calibration.greedy import MAX_SPARSITY, greedy_sparsities
from teal.errors import UserError

SIZES = {"q": 16, "k": 4, "v": 4, "o": 16, "gate": 56, "up": 56, "down": 56}


def block_sparsity(sparsities: dict[str, float]) -> float:
    return sum(sparsities[n] * SIZES[n] for n in SIZES) / sum(SIZES.values())


def separable(seed: int) -> Callable[[dict[str, float]], float]:
    """An error that is a sum of convex parts, one a projection, as independent perturbations give."""
    generator = random.Random(seed)
    costs = {name: size * generator.uniform(0.2, 3) for name, size in SIZES.items()}
    return lambda p: sum(costs[n] * p[n] ** 2.5 for n in p) ** 0.5


def algorithm_1(
    error: Callable[[dict[str, float]], float], sizes: dict[str, int], targets: list[float], step: float
) -> list[dict[str, float]]:  # fmt: skip
    """As greedy_sparsities, as the paper writes it: each step computes the errors of all projections."""
    total = sum(sizes.values())
    steps = {name: step / len(sizes) * total / size for name, size in sizes.items()}
    current = dict.fromkeys(sizes, 0.0)
    found: dict[float, dict[str, float]] = {}
    while len(found) < len(targets):
        reached = sum(current[name] * size for name, size in sizes.items()) / total
        raised = {name: min(p + steps[name], MAX_SPARSITY) for name, p in current.items() if p < MAX_SPARSITY}
        best = min(raised, key=lambda name: error(current | {name: raised[name]}))
        gain = (raised[best] - current[best]) * sizes[best] / total
        for target in set(targets) - set(found):
            if reached >= target - 1e-9:
                found[target] = dict(current)
            elif reached + gain > target:  # it ends within the step
                found[target] = current | {best: current[best] + (target - reached) * total / sizes[best]}
        current[best] = raised[best]
    return [found[target] for target in targets]


@pytest.mark.parametrize("allocate", [greedy_sparsities, algorithm_1])
def test_targets_are_met_exactly_by_memory(allocate: Callable[..., list[dict[str, float]]]) -> None:
    targets = [0.5, 0.25, 0.65]
    for target, found in zip(targets, allocate(separable(0), SIZES, targets, 0.05), strict=True):
        assert block_sparsity(found) == pytest.approx(target, abs=1e-9)
        assert all(0 <= p <= MAX_SPARSITY for p in found.values())


@pytest.mark.parametrize("seed", range(5))
def test_lazy_evaluation_finds_what_algorithm_1_finds(seed: int) -> None:
    evaluations = {}
    results = {}
    for allocate in (greedy_sparsities, algorithm_1):
        count = 0
        error = separable(seed)

        def counted(p: dict[str, float], error: Callable[[dict[str, float]], float] = error) -> float:
            nonlocal count
            count += 1
            return error(p)

        results[allocate] = allocate(counted, SIZES, [0.4, 0.6], 0.05)
        evaluations[allocate] = count
    assert results[greedy_sparsities] == results[algorithm_1]
    assert evaluations[greedy_sparsities] < 0.5 * evaluations[algorithm_1]


def test_the_sensitive_projection_stays_denser() -> None:
    def error(p: dict[str, float]) -> float:
        return sum((100 if n == "v" else 1) * SIZES[n] * p[n] ** 2 for n in p) ** 0.5

    [found] = greedy_sparsities(error, SIZES, [0.5], 0.05)
    assert found["v"] < 0.25 < 0.35 < min(p for n, p in found.items() if n != "v")
    even = error(dict.fromkeys(SIZES, 0.5))
    assert error(found) < even


def test_small_steps_come_near_the_optimum() -> None:
    """For costs c_i p_i^2 under a memory budget the optimum is p_i proportional to size_i / c_i."""
    costs = {name: size * (1 + i) for i, (name, size) in enumerate(SIZES.items())}
    [found] = greedy_sparsities(lambda p: sum(costs[n] * p[n] ** 2 for n in p) ** 0.5, SIZES, [0.2], 0.005)
    scale = 0.2 * sum(SIZES.values()) / sum(s * s / costs[n] for n, s in SIZES.items())
    for name, size in SIZES.items():
        assert found[name] == pytest.approx(scale * size / costs[name], abs=0.005 * 172 / 7 / size + 0.01)


def test_dense_and_unreachable_targets() -> None:
    assert greedy_sparsities(separable(0), SIZES, [0.0], 0.05) == [dict.fromkeys(SIZES, 0.0)]
    with pytest.raises(UserError, match=r"0\.96 cannot be reached"):
        greedy_sparsities(separable(0), SIZES, [0.5, 0.96], 0.05)
