"""Calibration block by block: targets met, plans independent of how they were computed, work resumed."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal.calibration import thresholds as calibration
from teal.calibration.sensitivity import BackwardPass
from teal.calibration.stages import BlockStages, Positions, Stream, weight_counts
from teal.calibration.thresholds import calibrate, measure_sparsity, use_layer, with_achieved
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.layers.phase import decoding
from teal.model import KVCache, Transformer
from teal.options import Settings
from teal.plan import SparsityPlan
from teal.teal_layers import (
    achieved_sparsity,
    set_counting,
    sparse_prefill,
    sparsify,
    sparsify_block,
)
from tests.conftest import PROJECTIONS, assert_near, relative_error

CPU = torch.device("cpu")
FACTS = {"text": "t"}


@pytest.fixture
def model(tiny_folder: Path) -> Transformer:
    return load_model(tiny_folder, CPU, torch.float32)


@pytest.fixture
def sequences() -> Tensor:
    return torch.randint(5, 300, (6, 64), generator=torch.Generator().manual_seed(0))


def all_plans(plan: SparsityPlan) -> list[float]:
    return [p.threshold for layer in plan.layers for p in layer.values()]


@pytest.mark.parametrize("method", ["uniform", "greedy", "global"])
def test_achieved_sparsity_is_the_planned_one(method: str, model: Transformer, sequences: Tensor) -> None:
    """On the calibration tokens themselves, since thresholds are set on what the sparse model really computes."""
    targets = (0.3, 0.6)
    settings = Settings(targets, method)
    for target, plan in zip(targets, calibrate(model, sequences, settings, FACTS), strict=True):
        assert (plan.method, plan.target) == (method, target)
        sparsify(model, plan)
        for layer, seen in zip(plan.layers, measure_sparsity(model, sequences), strict=True):
            for name in PROJECTIONS:
                assert seen[name] == pytest.approx(layer[name].sparsity, abs=0.015), name
        if method == "uniform":
            assert {p.sparsity for layer in plan.layers for p in layer.values()} == {target}


def test_stages_make_up_the_block(model: Transformer, sequences: Tensor) -> None:
    sparsify_block(model.blocks[1], dict.fromkeys(PROJECTIONS, 0.3))
    stages = BlockStages(Positions(model, sequences.shape[1]), 1)
    with torch.inference_mode(), sparse_prefill(model):
        x = model.embedding(sequences[:1])
        stream = Stream([x], CPU, offload=False)
        for p in stages.projections:
            stream = stages.after(p, stream, stages.inputs(p, stream))
        assert_near("output of the block", stream.parts[0], stages.forward(x), 1e-6)


def test_several_targets_at_once_equal_one_at_a_time(tiny_folder: Path, sequences: Tensor) -> None:
    for method in ("uniform", "greedy", "global"):
        together = calibrate(
            load_model(tiny_folder, CPU, torch.float32), sequences, Settings((0.2, 0.5), method), FACTS
        )
        for plan in together:
            model = load_model(tiny_folder, CPU, torch.float32)
            assert calibrate(model, sequences, Settings((plan.target,), method), FACTS) == [plan]


def test_global_sparsities_meet_the_target_by_memory(model: Transformer, sequences: Tensor) -> None:
    [plan] = calibrate(model, sequences, Settings((0.5,), "global"), FACTS)
    sizes = weight_counts(model.config.projections())
    shares = [[p.sparsity * sizes[name] for name, p in layer.items()] for layer in plan.layers]
    assert sum(map(sum, shares)) / (len(shares) * sum(sizes.values())) == pytest.approx(0.5, abs=1e-5)
    assert len({p.sparsity for layer in plan.layers for p in layer.values()}) > len(PROJECTIONS)
    with pytest.raises(UserError, match=r"sparsity 0.97 cannot be reached: no projection goes beyond 0.95"):
        calibrate(model, sequences, Settings((0.97,), "global"), FACTS)


def test_offload_changes_nothing(tiny_folder: Path, model: Transformer, sequences: Tensor) -> None:
    settings = Settings((0.5,), "greedy")
    assert calibrate(model, sequences, settings, FACTS) == calibrate(
        load_model(tiny_folder, CPU, torch.float32), sequences, settings, FACTS, offload=True
    )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", ["uniform", "greedy", "global"])
def test_interrupted_work_is_resumed(
    method: str,
    tiny_folder: Path,
    model: Transformer,
    sequences: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, progress = Settings((0.25, 0.5), method), tmp_path / "progress.json"
    whole = calibrate(model, sequences, settings, FACTS)
    original, calls = calibration.set_thresholds, []

    def failing(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 6:  # in the third block
            raise Interrupted
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "set_thresholds", failing)
    with pytest.raises(Interrupted):
        calibrate(load_model(tiny_folder, CPU, torch.float32), sequences, settings, FACTS, progress_file=progress)
    assert len(json.loads(progress.read_text())["blocks"]) == 2
    calls.clear()
    fresh = load_model(tiny_folder, CPU, torch.float32)
    assert calibrate(fresh, sequences, settings, FACTS, progress_file=progress) == whole
    assert len(calls) == 2 and not progress.exists()  # one block, two targets


def test_progress_of_other_work_is_not_used(model: Transformer, sequences: Tensor, tmp_path: Path) -> None:
    progress = tmp_path / "progress.json"
    for content in ('{"key": {"tokens": "other"}, "blocks": [[{}]]}', "{", "[]"):
        progress.write_text(content)
        [plan] = calibrate(model, sequences, Settings((0.5,)), FACTS, progress_file=progress)
        assert len(plan.layers) == 3 and set(plan.layers[0]) == set(PROJECTIONS)


def test_estimated_errors_serve_all_targets(
    tiny_folder: Path, sequences: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept in a file, they give another target the plan that it would have had; another text has its own."""

    def plans(text: Tensor, target: float, curves: Path | None = None) -> list[SparsityPlan]:
        return calibrate(load_model(tiny_folder, CPU, torch.float32), text, Settings((target,)), FACTS, curves=curves)

    expected, curves = plans(sequences, 0.6), tmp_path / "curves.safetensors"
    sparse = load_model(tiny_folder, CPU, torch.float32)
    calibrate(sparse, sequences, Settings((0.4,)), FACTS, curves=curves)
    with monkeypatch.context() as patch:
        patch.setattr(BackwardPass, "forward", None)
        assert plans(sequences, 0.6, curves) == expected
        assert calibrate(sparse, sequences, Settings((0.6,)), FACTS, curves=curves) == expected, "of a sparse model"
    assert plans(sequences[:2], 0.6, curves) == plans(sequences[:2], 0.6)


def test_greedy_hurts_each_block_less_than_uniform(model: Transformer, sequences: Tensor) -> None:
    plans = {m: calibrate(model, sequences, Settings((0.5,), m), FACTS)[0] for m in ("uniform", "greedy")}
    dense = load_dense_errors(model, sequences, plans)
    assert dense["greedy"][0] < dense["uniform"][0]
    sizes = weight_counts(model.config.projections())
    for layer in plans["greedy"].layers:
        share = sum(layer[n].sparsity * size for n, size in sizes.items()) / sum(sizes.values())
        assert share == pytest.approx(0.5, abs=1e-4)


@torch.inference_mode()
def load_dense_errors(model: Transformer, sequences: Tensor, plans: dict[str, SparsityPlan]) -> dict[str, list[float]]:
    """Relative error of each block's output, by plan, on the dense model's activations."""
    errors: dict[str, list[float]] = {name: [] for name in plans}
    x, positions = model.embedding(sequences[:1]), Positions(model, sequences.shape[1])
    for i, block in enumerate(model.blocks):
        stages = BlockStages(positions, i)
        expected = stages.forward(x)
        for name, plan in plans.items():
            use_layer(block, plan.layers[i])
            with sparse_prefill(model):
                errors[name].append(relative_error(stages.forward(x), expected))
        x = expected
    return errors


def test_seen_histograms_explain_the_thresholds(model: Transformer, sequences: Tensor) -> None:
    seen: list = []
    plans = calibrate(model, sequences, Settings((0.2, 0.5), "uniform"), FACTS, seen=seen)
    for i, block in enumerate(seen):
        for histograms, plan in zip(block, plans, strict=True):
            for name in PROJECTIONS:
                assert histograms[name].quantile(plan.target) == plan.layers[i][name].threshold


def test_counting_works_after_calibration(model: Transformer, sequences: Tensor) -> None:
    """Calibration runs in inference mode; what it leaves in the model must be usable outside."""
    calibrate(model, sequences, Settings((0.5,), "uniform"), FACTS)
    set_counting(model, True)
    with torch.inference_mode(), decoding(model):
        model(sequences[:1, :1], torch.zeros(1, 1, dtype=torch.int64), KVCache(model.config, 1, 8, CPU, torch.float32))
    assert all(0 < share < 1 for layer in achieved_sparsity(model) for share in layer.values())
    set_counting(model, False)


def test_held_out_measurement_is_kept(model: Transformer, sequences: Tensor) -> None:
    [plan] = calibrate(model, sequences, Settings((0.5,), "uniform"), FACTS)
    measured = with_achieved(model, plan, sequences)
    assert all(p.achieved == pytest.approx(0.5, abs=0.02) for layer in measured.layers for p in layer.values())
    assert all_plans(measured) == all_plans(plan)


@torch.inference_mode()
def test_share_of_sparse_tokens(model: Transformer, sequences: Tensor) -> None:
    """With share 0.5 the first half of a call is the dense model's, the second half differs."""
    ids, positions = sequences[:1], torch.arange(64)[None]

    def logits() -> Tensor:
        return model(ids, positions, KVCache(model.config, 1, 64, CPU, torch.float32))[0]

    dense = logits()
    [plan] = calibrate(model, sequences, Settings((0.5,)), FACTS)
    sparsify(model, plan)
    with sparse_prefill(model, 0.5):
        half = logits()
    assert_near("logits of the first half", half[:32], dense[:32], 1e-5)
    assert relative_error(half[32:], dense[32:]) > 1e-2, "logits of the second half"
    assert_near("logits of a dense prefill", logits(), dense, 1e-5)


@pytest.mark.parametrize("arguments", [((1.0,),), ((0.5,), "best"), ((0.5,), "uniform", 0.0)])
def test_impossible_settings_are_refused(arguments: tuple) -> None:
    with pytest.raises(UserError):
        Settings(*arguments)
