"""What a row says of bytes and of achieved sparsity, and the curve drawn from rows."""

import json
from pathlib import Path

import pytest
import torch

from teal.bench import curve
from teal.calibration.thresholds import Settings, calibrate
from teal.checkpoint.weights import load_model
from teal.evaluation.quality import Case, Result, Score, evaluate
from teal.layers.rounding import quantize
from teal.plan import ProjectionPlan, SparsityPlan
from tests.conftest import assert_one_line_error
from tests.evaluation.test_evaluation import InvokeMain

CPU = torch.device("cpu")
# Weights of the tiny Llama's layer: hidden 48, 2 key/value heads of 8, intermediate 88.
COUNTS = {"q": 48 * 48, "k": 48 * 16, "v": 48 * 16, "o": 48 * 48, "gate": 48 * 88, "up": 48 * 88, "down": 88 * 48}
HEAD = 300 * 48


def tokens(count: int) -> torch.Tensor:
    return torch.randint(5, 300, (count,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_floats_count_as_16_bits_in_any_dtype(dtype: torch.dtype, tiny_folder: Path) -> None:
    [result] = evaluate(load_model(tiny_folder, CPU, dtype), tokens(100), [Case("dense", 0.0, None)], 64, 32)
    assert result.as_row()["bytes_per_token"] == 2 * (3 * sum(COUNTS.values()) + HEAD)


def test_integers_count_as_they_are_and_scales_as_16_bits(quantizable_folder: Path) -> None:
    """Hidden 64, intermediate 96, one of two heads for keys and values; int8 with a scale for 32 weights."""
    model = load_model(quantizable_folder, CPU, torch.float32)
    quantize(model, "int8", 32)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96
    [result] = evaluate(model, tokens(50), [Case("dense", 0.0, None)], 50, 49)
    expected = 3 * (layer + 2 * layer // 32) + 2 * 320 * 64
    assert result.as_row()["bytes_per_token"] == expected


@pytest.mark.parametrize("policy", ["decode", "half"])
def test_skipped_rows_are_not_read(policy: str, tiny_folder: Path) -> None:
    """Over windows of different lengths: what is read is what achieved sparsity leaves, head and all."""
    model = load_model(tiny_folder, CPU, torch.float32)
    [plan] = calibrate(model, tokens(256).view(4, 64), Settings((0.5,)), {})
    dense, sparse = evaluate(model, tokens(150), [Case("dense", 0.0, None), Case("u", 0.5, plan, policy)], 64, 63)
    kept = sum(2 * COUNTS[name] * (1 - share) for layer in sparse.achieved for name, share in layer.items())
    assert sparse.bytes_per_token == pytest.approx(kept + 2 * HEAD, rel=1e-6)
    assert dense.bytes_per_token == 2 * (3 * sum(COUNTS.values()) + HEAD)


def result_of(planned: dict[str, float], achieved: dict[str, float]) -> Result:
    plan = SparsityPlan({}, "x", 0.5, ({name: ProjectionPlan(p, 1.0) for name, p in planned.items()},) * 2)
    return Result(Case("x", 0.5, plan), {"q": 100, "down": 300}, Score(tokens=1), [achieved, planned])


def test_achieved_sparsity_weighs_projections_by_their_weights() -> None:
    """Two layers of 400 weights: q misses by +20 points in one of them, down by -4."""
    row = result_of({"q": 0.2, "down": 0.6}, {"q": 0.4, "down": 0.56}).as_row()
    assert row["achieved_sparsity"] == pytest.approx((40 + 168 + 20 + 180) / 800)
    assert row["signed_sparsity_gap"] == pytest.approx((20 - 12) / 800)
    assert row["worst_sparsity_gap"] == pytest.approx(0.2)
    assert row["mean_sparsity_gap"] == pytest.approx(0.24 / 4)


def row(method: str, size: int, kl: float, policy: str = "decode") -> dict[str, object]:
    return {"method": method, "sparsity": 0.5, "policy": policy, "kl": kl, "bytes_per_token": size}


def test_lines_of_files() -> None:
    """A line for each file and method; dense rows that diverge begin it, those that do not have no point."""
    bf16 = [row("dense", 90, 0.0), row("uniform", 60, 0.5), row("uniform", 70, 0.2), row("global", 60, 0.3, "half")]
    int4 = [row("dense", 30, 0.09), row("global", 20, 0.4)]
    found = curve.lines({"bf16": bf16, "int4": int4, "int8": [row("dense", 50, 0.01)]})
    assert found == {
        "bf16, uniform": [(60, 0.5), (70, 0.2)],
        "bf16, global, half": [(60, 0.3)],
        "int4, global": [(20, 0.4), (30, 0.09)],
        "int8, dense": [(50, 0.01)],
    }


def test_the_curve_is_drawn(call_main: InvokeMain, tmp_path: Path) -> None:
    rows = [row("dense", 30, 0.09), row("global", 20, 0.4)]
    (tmp_path / "int4.json").write_text(json.dumps({"model": "m", "rows": rows}))
    code, out, err = call_main(curve.main, tmp_path / "int4.json", "-o", tmp_path / "curve.png")
    assert code == 0, err
    assert json.loads(out)["lines"] == {"int4, global": [[20, 0.4], [30, 0.09]]}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_foreign_file_is_not_drawn_over(call_main: InvokeMain, tmp_path: Path) -> None:
    (tmp_path / "int4.json").write_text(json.dumps({"rows": [row("dense", 30, 0.09)]}))
    (tmp_path / "own.png").write_text("a photograph")
    code, _, err = call_main(curve.main, tmp_path / "int4.json", "-o", tmp_path / "own.png")
    assert_one_line_error(code, err, "own.png", "exists and is not")
    assert (tmp_path / "own.png").read_text() == "a photograph"


@pytest.mark.parametrize(
    "content,fragment",
    [("[]", "expected the output of evaluate.py --json"), ("no json", "expected the output of evaluate.py --json"),
     ('{"rows": [{"method": "dense"}]}', "lack one of method, policy, kl"), ('{"rows": []}', "no row diverges")],
)  # fmt: skip
def test_files_without_a_curve(content: str, fragment: str, call_main: InvokeMain, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    code, _, err = call_main(curve.main, tmp_path / "x.json", "-o", tmp_path / "curve.png")
    assert_one_line_error(code, err, fragment)
    assert not (tmp_path / "curve.png").exists()
