"""Histograms, thresholds, and plans on disk."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teal.errors import UserError
from teal.model import ModelConfig
from teal.plan import (
    Histogram,
    ProjectionPlan,
    SparsityPlan,
    bin_edges,
    config_fields,
    load_fitting_plan,
    plan_name,
)
from tests.conftest import PROJECTIONS

CONFIG = ModelConfig(100, 32, 64, 2, 4, 2, 8, 128)
P = (0.01, 0.25, 0.4, 0.5, 0.65, 0.9, 0.99)


def histogram_of(*parts: torch.Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_quantiles_of_a_gaussian(scale: float) -> None:
    """P(|x| < t) = erf(t / sqrt(2)), whatever the scale: the bins are logarithmic."""
    x = scale * torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    histogram = histogram_of(x[:100_000], x[100_000:].view(3, -1))
    for p in P:
        share = math.erf(histogram.quantile(p) / scale / math.sqrt(2))
        assert share == pytest.approx(p, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantile_drops_the_share_asked_for(dtype: torch.dtype) -> None:
    laplace = torch.distributions.Laplace(0.0, 0.3)
    torch.manual_seed(0)
    x = laplace.sample((200_000,)).to(dtype)
    histogram = histogram_of(x)
    for p in P:
        threshold = torch.tensor(histogram.quantile(p)).to(dtype)
        assert float((x.abs() < threshold).float().mean()) == pytest.approx(p, abs=0.01 if p > 0.05 else 0.02)


def test_extremes() -> None:
    assert histogram_of(torch.ones(10)).quantile(0.0) == 0.0
    assert histogram_of(torch.zeros(10), torch.ones(10)).quantile(0.4) < 1e-6
    assert math.isfinite(histogram_of(torch.tensor([1e38, -1e38, math.inf])).quantile(0.9))
    with pytest.raises(UserError, match="no activations"):
        Histogram().quantile(0.5)
    with pytest.raises(UserError, match="NaN"):
        histogram_of(torch.tensor([math.nan]))
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(UserError, match="out of range"):
            histogram_of(torch.ones(1)).quantile(p)


@pytest.fixture
def plan() -> SparsityPlan:
    layer = {name: ProjectionPlan(0.5, 0.1 * i) for i, name in enumerate(PROJECTIONS)}
    return SparsityPlan(config_fields(CONFIG), "uniform", 0.5, (layer, layer), {"text": "x"})


def test_plan_survives_the_disk(plan: SparsityPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == SparsityPlan.load(str(tmp_path / "plan.json")) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())["layers"][0]["q"]["sparsity"] == 0.5


@pytest.mark.parametrize(
    "edit,fragment",
    [
        ({"format": "other"}, "not a sparsity plan"),
        ({"version": 99}, "version 99"),
        ({"layers": [{"q": {"sparsity": 0.5, "threshold": 1.0}}]}, "layer 0"),
        ({"layers": [{"q": {"sparsity": 1.5, "threshold": 1.0}}]}, "1.5"),
        ({"layers": [{"q": {"sparsity": 0.5, "threshold": -1.0}}]}, "-1.0"),
        ({"layers": [{"q": {"sparsity": 0.5}}]}, "malformed"),
        ({"layers": 3}, "malformed"),
        ({"layers": [{"q": {"sparsity": 0.5, "threshold": math.nan}}]}, "nan"),
        ({"target": 2.0}, "2.0"),
        ({"criterion": "wina"}, "criterion 'wina' is not supported"),
    ],
)
def test_bad_plans_are_refused(edit: dict, fragment: str, plan: SparsityPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(UserError, match=r"plan .*plan\.json") as error:
        load_fitting_plan(path, CONFIG)
    assert fragment in str(error.value)


@pytest.mark.parametrize("version", [2, 3])
def test_an_older_plan_that_names_its_criterion_loads(version: int, plan: SparsityPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version, "criterion": "magnitude"}))
    assert SparsityPlan.load(path) == plan


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_files_that_are_no_plan(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"plan\.json"):
        SparsityPlan.load(path)
    with pytest.raises(UserError, match="missing"):
        SparsityPlan.load(tmp_path / "missing")


def test_projection_plan_checks_its_numbers() -> None:
    for sparsity, threshold in ((0.5, math.nan), (0.5, math.inf), (math.nan, 1.0), (1.0, 1.0)):
        with pytest.raises(UserError):
            ProjectionPlan(sparsity, threshold)


def test_plan_for_another_model_names_the_fields(plan: SparsityPlan) -> None:
    plan.check_fits(CONFIG)
    with pytest.raises(UserError, match="another model") as error:
        plan.check_fits(replace(CONFIG, hidden_size=48, rope_theta=5e5))
    assert "hidden_size 32 (this model: 48)" in str(error.value) and "rope_theta" in str(error.value)
    assert "vocab_size" not in str(error.value)
    partial = replace(plan, model={"num_layers": 2})  # an imported plan knows little of its model
    partial.check_fits(replace(CONFIG, hidden_size=48))
    with pytest.raises(UserError, match="2 layers"):
        partial.check_fits(replace(CONFIG, num_layers=3, sliding_windows=()))


def test_bin_edges_enclose_what_they_count() -> None:
    x = torch.tensor([1e-9, 0.1, 1.0, 1.004, 7.3])
    edges = bin_edges()
    for value in x.tolist():
        i = int(histogram_of(torch.tensor([value])).counts.argmax())
        assert edges[i] <= value < edges[i + 1]


def test_plan_names_are_distinct() -> None:
    assert len({plan_name(t) for t in (0.25, 0.4, 0.5, 0.05, 0.505)}) == 5
