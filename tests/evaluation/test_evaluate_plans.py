"""Which plan a figure is of: the one generate.py would take, named on stderr, with a word if it misses its target."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from teal.calibration.texts import default_text
from teal.cli import calibrate, evaluate, generate
from teal.decoding.engine import Engine
from teal.plan import ProjectionPlan, SparsityPlan, plan_name
from tests.conftest import PROJECTIONS, assert_one_line_error, link_files

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(call_main: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """call_main with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return call_main


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint folder without plans, to put some in."""
    return link_files(tiny_folder, tmp_path / "model", without="teal*.json")


@pytest.fixture
def options(folder: Path) -> tuple[str, ...]:
    return ("--checkpoint", str(folder), "--device", "cpu", "--dtype", "fp32")


EVALUATED = ("--tokens", "128", "--window", "64", "--stride", "32", "--json")


def test_the_plan_beside_the_checkpoint_is_evaluated(call: Command, options: tuple[str, ...], folder: Path) -> None:
    few = ("--sequences", "2", "--length", "64")
    assert call(calibrate.main, *options, *few, "--sparsity", "0.4", "--method", "greedy")[0] == 0
    beside = folder / plan_name(0.4)
    code, out, err = call(evaluate.main, *options, *EVALUATED, "--sparsity", "0.4")
    assert code == 0 and f"sparsity 0.4: plan {beside}" in err and "calibrating" not in err, err
    named = call(evaluate.main, *options, *EVALUATED, "--plan", beside)
    rows, expected = (json.loads(text)["rows"][1] for text in (out, named[1]))
    assert rows["method"] == "greedy" and rows["perplexity"] == expected["perplexity"]


def test_the_quick_plan_is_evaluated_where_there_is_none(call: Command, options: tuple[str, ...], folder: Path) -> None:
    engine = Engine.load(str(folder), sparsity=0.4, device="cpu", dtype="fp32")
    assert engine.plan is not None
    quick = folder.parent / "quick.json"
    engine.plan.save(quick)
    code, out, err = call(evaluate.main, *options, *EVALUATED, "--sparsity", "0.4")
    assert code == 0 and "sparsity 0.4: quick plan" in err and "calibrating" not in err, err
    named = call(evaluate.main, *options, *EVALUATED, "--plan", quick)
    rows, expected = (json.loads(text)["rows"][1] for text in (out, named[1]))
    assert rows["perplexity"] == expected["perplexity"]


@pytest.mark.parametrize(
    "told", [("--method", "uniform"), ("--sequences", "2"), ("--length", "64"), ("--calibration-text", "TEXT")]
)
def test_told_to_calibrate_it_does(
    call: Command, options: tuple[str, ...], folder: Path, told: tuple[str, str]
) -> None:
    (folder / plan_name(0.4)).write_text("a broken plan that nobody reads")
    text = folder.parent / "text.txt"
    text.write_text(default_text()[:80_000])
    chosen = [value.replace("TEXT", str(text)) for value in told]
    code, _, err = call(evaluate.main, *options, *EVALUATED, "--sparsity", "0.4", *chosen)
    method = told[1] if told[0] == "--method" else "global"
    assert code == 0 and f"calibrating {method} at 0.4" in err and f"sparsity 0.4: {method} plan on " in err, err


def test_a_missed_target_is_said(call: Command, options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    good = Engine.load(str(folder), sparsity=0.4, device="cpu", dtype="fp32").plan
    assert good is not None
    layers = tuple({n: replace(p, threshold=p.threshold / 2) for n, p in layer.items()} for layer in good.layers)
    good.save(tmp_path / "good.json")
    replace(good, layers=layers).save(tmp_path / "bad.json")
    generated = ("--prompt", "The European lobster lives", "--max-new-tokens", "24", "--ignore-eos", "--stats")
    for main, more in ((evaluate.main, EVALUATED), (generate.main, generated)):
        code, _, err = call(main, *options, *more, "--plan", tmp_path / "bad.json")
        [line] = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert code == 0 and float(re.findall(r"by -([\d.]+) points on average", line)[0]) > 5
        code, _, err = call(main, *options, *more, "--plan", tmp_path / "good.json")
        assert code == 0 and "warning" not in err, err


def test_calibration_says_that_held_out_text_is_unlike(
    call: Command, options: tuple[str, ...], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every plan is measured on the held-out part; here the measurement is made to differ by 10 points."""
    from teal.calibration import thresholds as calibration

    few = (*options, "--method", "uniform", "--sequences", "16", "--length", "256", "-o", tmp_path / "plan.json")
    assert "warning" not in call(calibrate.main, *few)[2]
    measure = calibration.measure_sparsity
    monkeypatch.setattr(
        calibration, "measure_sparsity", lambda *a: [{n: s - 0.1 for n, s in layer.items()} for layer in measure(*a)]
    )
    code, _, err = call(calibrate.main, *few)
    assert code == 0 and "warning: on held-out text the plan for sparsity 0.5 misses its target, by -" in err, err


def test_what_is_a_miss() -> None:
    plan = SparsityPlan({}, "uniform", 0.5, (dict.fromkeys(PROJECTIONS, ProjectionPlan(0.5, 0.1)),) * 2)

    def line(first: float, second: float, down: float, tokens: int) -> str | None:
        layers = [dict.fromkeys(PROJECTIONS, share) for share in (first, second)]
        layers[1]["down"] = down
        return plan.warning(layers, tokens, "x")

    assert line(0.46, 0.46, 0.46, 10_000) is None and plan.warning([{}, {}], 10_000, "x") is None
    assert line(0.4, 0.6, 0.6, 30) is None  # so few tokens tell an average only
    for tokens in (30, 10_000):
        said = line(0.4, 0.4, 0.2, tokens)
        assert said is not None and "-11.4 points on average" in said and "-30.0 in layer 1 down" in said
    said = line(0.5, 0.5, 0.6, 10_000)
    assert said is not None and "+0.7 points on average and +10.0 in layer 1 down" in said


def test_a_first_run_says_that_it_calibrates_and_counts_the_time(call: Command, options: tuple[str, ...]) -> None:
    first = (*options, "--prompt", "The", "--max-new-tokens", "2", "--sparsity", "0.3", "--json")
    code, out, err = call(generate.main, *first)
    assert code == 0 and "calibrating sparsity 0.3" in err
    assert json.loads(out)["calibrate_s"] > 0
    code, out, err = call(generate.main, *first)
    assert code == 0 and "calibrating" not in err and json.loads(out)["calibrate_s"] == 0
    drafted = ("--prompt", "The", "--max-new-tokens", "2", "--speculate", "2", "--draft-sparsity", "0.6", "--json")
    assert json.loads(call(generate.main, *options, *drafted)[1])["calibrate_s"] > 0


@pytest.mark.parametrize("size,part", [(20_000, "4/5 for calibration"), (12_000, "1/5 held out")])
def test_too_short_a_text_is_counted_whole(
    size: int, part: str, call: Command, options: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text(default_text()[:size])
    count = ("--sequences", "40") if size == 20_000 else ("--sequences", "2")
    code, _, err = call(calibrate.main, *options, "--text", tmp_path / "short.txt", *count, "--length", "400")
    assert_one_line_error(code, err, f"the text of {size} characters is too short", part, "--text")
