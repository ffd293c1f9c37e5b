"""Quality figures: exact token counts, agreement with transformers, and the decode path's truth."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teal.calibration.texts import default_text, first_tokens
from teal.calibration.thresholds import Settings
from teal.calibration.thresholds import calibrate as calibrate_model
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.cli import calibrate, quantize
from teal.cli import evaluate as evaluate_cli
from teal.errors import UserError
from teal.evaluation.quality import (
    Case,
    agreements_with_dense,
    continue_greedily,
    decode_score,
    departures,
    evaluate,
    windows,
)
from teal.model import Transformer
from teal.plan import ESTIMATE, SparsityPlan, keep_all_plan
from teal.teal_layers import sparsify
from tests.conftest import (
    QUANTIZABLE,
    assert_one_line_error,
    file_size_limit,
    link_files,
    own_cache,
    run_command,
    save_tiny_model,
    tiny_config,
)

CPU = torch.device("cpu")
InvokeMain = Callable[..., tuple[int, str, str]]


@given(st.integers(2, 500), st.integers(2, 100), st.data())
def test_every_token_but_the_first_is_scored_once(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    scored: list[int] = []
    for begin, first, end in windows(count, length, stride):
        assert begin < first < end <= begin + length
        assert begin == 0 or first - begin >= length - stride
        scored += range(first, end)
    assert scored == list(range(1, count))


@pytest.fixture
def model(tiny_folder: Path) -> Transformer:
    return load_model(tiny_folder, CPU, torch.float32)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(5, 300, (150,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plan(tiny_folder: Path) -> SparsityPlan:
    sequences = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(2))
    return calibrate_model(load_model(tiny_folder, CPU, torch.float32), sequences, Settings((0.5,), "uniform"), {})[0]


def reference_perplexity(model: Any, tokens: Tensor, length: int, stride: int) -> float:
    """Strided perplexity by transformers' own loss-free forward, one window at a time."""
    total, count, done = 0.0, 0, 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        with torch.inference_mode():
            logits = model(tokens[None, begin:end]).logits[0].double().log_softmax(-1)
        for i in range(done, end):
            total -= float(logits[i - begin - 1, tokens[i]])
            count += 1
        done = end
        if end == len(tokens):
            break
    assert count == len(tokens) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("length,stride", [(64, 32), (64, 63), (400, 100), (50, 7)])
def test_perplexity_equals_transformers(length: int, stride: int, tiny_folder: Path, tokens: Tensor) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    [result] = evaluate(load_model(tiny_folder, CPU, torch.float32), tokens, [Case("dense", 0.0, None)], length, stride)
    assert result.score.tokens == len(tokens) - 1
    assert result.score.perplexity == pytest.approx(reference_perplexity(reference, tokens, length, stride), rel=1e-4)


def test_default_models_perplexity_equals_transformers(default_folder: Path, default_floats: Path) -> None:
    tokens = first_tokens(load_tokenizer(default_folder).encode, default_text()[20_000:], 600)
    reference = transformers.AutoModelForCausalLM.from_pretrained(default_floats, dtype=torch.float32)
    model = load_model(default_folder, CPU, torch.float32)
    [result] = evaluate(model, tokens, [Case("dense", 0.0, None)], 256, 128)
    assert result.score.perplexity == pytest.approx(reference_perplexity(reference, tokens, 256, 128), rel=5e-3)
    assert 3 < result.score.perplexity < 60


def test_a_plan_that_drops_nothing_is_the_dense_model(model: Transformer, tokens: Tensor) -> None:
    dense, same = evaluate(
        model, tokens, [Case("dense", 0.0, None), Case("x", 0.0, keep_all_plan(model.config))], 64, 32
    )
    assert dense.score.kl == 0.0 and dense.score.agreed == dense.score.tokens
    assert same.score.perplexity == pytest.approx(dense.score.perplexity, rel=1e-5)
    assert abs(same.score.kl) < 1e-4 and same.score.agreed == same.score.tokens


def test_sparsity_diverges_and_half_a_window_less_so(model: Transformer, tokens: Tensor, plan: SparsityPlan) -> None:
    cases = [Case("dense", 0.0, None), Case("u", 0.5, plan), Case("u", 0.5, plan, "half")]
    dense, decode, half = evaluate(model, tokens, cases, 64, 63)
    assert decode.score.kl > half.score.kl > 0
    assert decode.score.agreed < half.score.agreed < dense.score.agreed
    row = decode.as_row()
    assert row["worst_sparsity_gap"] < 0.05 and row["tokens"] == len(tokens) - 1


def test_divergence_from_a_reference(model: Transformer, tokens: Tensor, plan: SparsityPlan, tiny_folder: Path) -> None:
    other = load_model(tiny_folder, CPU, torch.float32)
    sparsify(model, plan)
    cases = [Case("dense", 0.0, None), Case("sparse", 0.5, plan)]
    own = evaluate(model, tokens, cases, 32, 16)
    same = evaluate(model, tokens, cases, 32, 16, other)
    assert [r.score.kl for r in same] == pytest.approx([r.score.kl for r in own], abs=1e-4)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    far = evaluate(model, tokens, cases, 32, 16, other)
    assert all(b.score.kl > a.score.kl + 1 and b.score.nll == a.score.nll for a, b in zip(own, far, strict=True))


def test_decode_path_agrees_with_the_batched_path(model: Transformer, tokens: Tensor, plan: SparsityPlan) -> None:
    """The figure users get token by token is the batched decode policy's, and not the half policy's."""
    cases = [Case("u", 0.5, plan), Case("u", 0.5, plan, "half")]
    batched, half = evaluate(model, tokens, cases, len(tokens), len(tokens) - 1)
    sparsify(model, plan)
    decoded = decode_score(model, tokens)
    assert decoded.tokens == batched.score.tokens
    assert decoded.perplexity == pytest.approx(batched.score.perplexity, rel=1e-4)
    assert decoded.perplexity != pytest.approx(half.score.perplexity, rel=1e-3)


def test_departures() -> None:
    expected = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert departures(expected, torch.tensor([[1, 2, 3], [9, 2, 3], [1, 2, 9]])) == [3, 0, 2]


def test_greedy_continuations(tiny_folder: Path, model: Transformer, tokens: Tensor, plan: SparsityPlan) -> None:
    prompts = tokens[:20].view(2, 10)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    expected = reference.generate(prompts, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(continue_greedily(model, prompts, 12), expected[:, 10:])
    same, other = agreements_with_dense(model, [keep_all_plan(model.config), plan], tokens, 2)
    assert same == 128 and other < 128
    with pytest.raises(UserError, match="640 tokens"):
        agreements_with_dense(model, [plan], tokens, 10)


def test_too_few_tokens(model: Transformer) -> None:
    with pytest.raises(UserError, match="has 1 tokens"):
        evaluate(model, torch.tensor([3]), [], 64, 32)


@pytest.fixture
def call(call_main: InvokeMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> InvokeMain:
    """call_main with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return call_main


@pytest.fixture
def model_options(tiny_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "text.txt").write_text(default_text()[:60_000])
    options = ("--checkpoint", str(tiny_folder), "--device", "cpu", "--dtype", "fp32")
    return (*options, "--text", str(tmp_path / "text.txt"), "--sequences", "3", "--length", "64")


def test_calibrate_then_evaluate_and_show(call: InvokeMain, model_options: tuple[str, ...], tmp_path: Path) -> None:
    arguments = (*model_options, "--sparsity", "0.3,0.5", "--method", "greedy", "-o", tmp_path)
    code, out, err = call(calibrate.main, *arguments, "--plot", tmp_path / "figures")
    assert code == 0, err
    paths = [Path(line) for line in out.splitlines()]
    assert [p.name.endswith(f"teal-{t}.json") for p, t in zip(paths, (0.3, 0.5), strict=True)] == [True, True]
    assert all(p.achieved is not None for layer in SparsityPlan.load(paths[1]).layers for p in layer.values())
    for name in ("sparsity-0.3.png", "inputs-0.5.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    code, out, _ = call(calibrate.main, "--show", paths[0])
    assert code == 0 and "greedy, target 0.3" in out and len(out.splitlines()) == 3 + 3
    base = (*model_options[:8], "--tokens", "200", "--window", "100", "--stride", "50")
    code, out, err = call(evaluate_cli.main, *base, "--plan", paths[1], "--json", "--csv", tmp_path / "rows.csv",
                          "--plot", tmp_path / "q.png", "--decode-tokens", "20", "--continuations", "2")  # fmt: skip
    assert code == 0, err
    dense, sparse = json.loads(out)["rows"]
    assert dense["tokens"] == sparse["tokens"] == 199 and sparse["kl"] > 0 and sparse["decode_perplexity"] > 0
    with (tmp_path / "rows.csv").open() as file:
        assert [float(row["perplexity"]) for row in csv.DictReader(file)] == [
            dense["perplexity"],
            sparse["perplexity"],
        ]
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")


def test_a_grid_is_calibrated_and_cached(
    call: InvokeMain, model_options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = ("--sparsity", "0.2,0.5", "--method", "uniform,greedy", "--policy", "decode,half", "--tokens", "120")
    text = model_options[7]
    arguments = (*model_options, *grid, "--calibration-text", text, "--window", "60", "--stride", "30")
    code, out, err = call(evaluate_cli.main, *arguments, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert len(rows) == 1 + 2 * 2 * 2 and "calibrating" in err
    again = call(evaluate_cli.main, *arguments, "--json")
    assert json.loads(again[1])["rows"] == rows and "calibrating" not in again[2]
    code, out, _ = call(evaluate_cli.main, *arguments)
    assert code == 0 and out.splitlines()[0].split()[:3] == ["method", "sparsity", "policy"]
    monkeypatch.setattr("teal.plan.ESTIMATE", ESTIMATE + 1)  # as of a release that finds plans otherwise
    assert "calibrating" in call(evaluate_cli.main, *arguments)[2]


def test_plan_beside_the_checkpoint_is_used(
    call: InvokeMain, model_options: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    from teal.decoding.engine import Engine

    folder = link_files(tiny_folder, tmp_path / "model")
    options = ("--checkpoint", folder, *model_options[2:])
    code, out, err = call(calibrate.main, *options, "--sparsity", "0.4", "--method", "greedy")
    assert code == 0, err
    assert out.strip() == str(folder / "teal-0.4.json")
    engine = Engine.load(str(folder), sparsity=0.4, device="cpu", dtype="fp32")
    assert engine.plan == SparsityPlan.load(folder / "teal-0.4.json") and engine.plan.method == "greedy"


MISTAKES: list[tuple[Callable[[], None], tuple[str, ...], str]] = [
    (calibrate.main, ("--sparsity", "1.0"), "'1.0'"),
    (calibrate.main, ("--sparsity", "0.97", "--method", "greedy"), "cannot be reached"),
    (calibrate.main, ("--step", "0"), "--step 0.0"),
    (calibrate.main, ("--sparsity", "0.2,0.3", "-o", "x.json"), "names one file"),
    (calibrate.main, ("-o", "/no/such/folder"), "no such folder"),
    (calibrate.main, ("--length", "400", "--sequences", "1000"), "1000 sequences of 400 tokens are needed"),
    (calibrate.main, ("--show", "README.md"), "README.md"),
    (calibrate.main, ("--import-teal", "tests"), "layer-0"),
    (evaluate_cli.main, ("--method", "best"), "'best'"),
    (evaluate_cli.main, ("--policy", "none"), "'none'"),
    (evaluate_cli.main, ("--window", "10", "--stride", "20"), "--stride 20"),
    (evaluate_cli.main, ("--window", "10", "--stride", "10"), "less than --window 10"),
    (evaluate_cli.main, ("--csv", "/no/such/rows.csv"), "no such folder"),
    (evaluate_cli.main, ("--plan", "missing.json"), "missing.json"),
]


@pytest.mark.parametrize("main,arguments,fragment", MISTAKES, ids=lambda v: v if isinstance(v, str) else None)
def test_mistakes_are_one_line(
    main: Callable[[], None],
    arguments: tuple[str, ...],
    fragment: str,
    call: InvokeMain,
    model_options: tuple[str, ...],
) -> None:
    code, out, err = call(main, *(model_options if main is calibrate.main else model_options[:8]), *arguments)
    assert out == ""
    assert_one_line_error(code, err, fragment)


@pytest.mark.parametrize(
    "content,fragment", [(b"", "too short"), (b"a few words", "too short"), (b"\xff\xfe", "not UTF-8")]
)
def test_unusable_text(
    content: bytes, fragment: str, call: InvokeMain, model_options: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    options = (*model_options[:6], "--text", tmp_path / "bad.txt")
    code, _, err = call(calibrate.main, *options)
    assert_one_line_error(code, err, fragment)


@pytest.mark.parametrize("main", [calibrate.main, evaluate_cli.main, quantize.main])
def test_a_tokenizer_of_another_model(
    main: Callable[[], None], call: InvokeMain, model_options: tuple[str, ...], tmp_path: Path,
    byte_level_tokenizer_json: str,
) -> None:  # fmt: skip
    """Its tokens would be rows that the embedding does not have."""
    folder = tmp_path / "model"
    save_tiny_model(tiny_config("llama", **QUANTIZABLE | {"vocab_size": 100}), folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    mode = ("--mode", "int4", "--method", "gptq", "--group-size", "32", "-o", tmp_path / "out")
    options = ("--checkpoint", folder, *model_options[6:8], *(mode if main is quantize.main else ()))
    code, out, err = call(main, *options)
    assert out == ""
    assert_one_line_error(code, err, "its tokenizer gives token", "its weights have 100 tokens")
    assert not (tmp_path / "out").exists()


def test_plan_for_another_model(
    call: InvokeMain, model_options: tuple[str, ...], plan: SparsityPlan, tmp_path: Path
) -> None:
    replace(plan, model={**plan.model, "rope_theta": 7.0}).save(tmp_path / "plan.json")
    code, _, err = call(evaluate_cli.main, *model_options[:8], "--plan", tmp_path / "plan.json")
    assert_one_line_error(code, err, "rope_theta 7.0", "calibrate for this model")


def test_full_disk_leaves_no_plan(tiny_folder: Path, plan: SparsityPlan, tmp_path: Path) -> None:
    import subprocess
    import sys

    from tests.conftest import ROOT

    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import sys; from pathlib import Path; from teal.cli import calibrate, command_line\n"
        "from teal.plan import SparsityPlan\n"
        "source, target = map(Path, sys.argv[1:])\n"
        "command_line.run(lambda: calibrate.save([SparsityPlan.load(source)], [target]))"
    )
    plan.save(tmp_path / "p.json")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "p.json"), str(out / "q.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=file_size_limit(200),
    )
    assert_one_line_error(done.returncode, done.stderr, "disk is full")
    assert list(out.iterdir()) == []


def test_interrupted_calibration_keeps_its_progress_and_writes_no_plan(tmp_path: Path) -> None:
    """Ctrl-C: exit 130 without a traceback, no plan; the finished blocks wait for the next run."""
    import os
    import signal
    import subprocess
    import sys
    import time

    from tests.conftest import ROOT

    options = ("--random-weights", "SmolLM2-135M", "--device", "cpu", "--sequences", "2", "--length", "256")
    process = subprocess.Popen(
        [sys.executable, "calibrate.py", *options, "-o", str(tmp_path / "plan.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(own_cache(tmp_path / "cache"))},
    )
    progress = tmp_path / "cache" / "teal" / "calibration"
    deadline = time.monotonic() + 300
    while not list(progress.glob("*.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in err
    assert not (tmp_path / "plan.json").exists() and len(list(progress.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("script", ["calibrate.py", "evaluate.py"])
def test_help_is_complete(script: str) -> None:
    parser = (calibrate if script == "calibrate.py" else evaluate_cli).build_parser()
    assert all(action.help for action in parser._actions)
    text = parser.format_help()
    assert all(action.option_strings[-1] in text for action in parser._actions if action.option_strings)


def test_scripts_start_from_the_command_line() -> None:
    for script in ("calibrate", "evaluate"):
        done = run_command("-m", script, "--help")
        assert done.returncode == 0 and b"--sparsity" in done.stdout
