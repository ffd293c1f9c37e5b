"""The GPU benchmarks' own logic, as far as it needs no GPU."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from teal.bench import allreduce, backends, decode, gemv, load, tune
from teal.bench.steps import fitted_plan
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.kernels.gemv import tuning
from teal.kernels.gemv.tuning import GemvTile, user_tiles, user_tiles_path
from teal.options import SamplingParams
from teal.plan import SparsityPlan
from teal.teal_layers import achieved_sparsity, set_counting
from tests.conftest import assert_one_line_error, run_command, save_tiny_model, tiny_config


class FakeWeights:
    """Stands for ColdWeights: a tile's time is its distance from the tile that is best here."""

    best = GemvTile(1024, 1, 4, 44, 4)
    floats = (torch.zeros(1),)
    K, bits = 4096, 16

    def sparse_us(self, thresholds: torch.Tensor, segments: list[int], tile: GemvTile) -> float:
        return abs(tile.block_n - self.best.block_n) + abs(tile.unroll - self.best.unroll) + abs(tile.splits - 44) / 9


def test_shapes_of_a_known_model() -> None:
    shapes = gemv.shapes_of("llama-3-8b")
    assert shapes == {
        "qkv": (4096, [4096, 1024, 1024]),
        "o": (4096, [4096]),
        "gate_up": (4096, [14336, 14336]),
        "down": (14336, [4096]),
    }


def test_thresholds_drop_the_share_of_a_gaussian() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.25, 0.5, 0.8):
        [cut] = gemv.thresholds_for(sparsity, [8], torch.device("cpu")).tolist()
        assert float((x.abs() < cut).float().mean()) == pytest.approx(sparsity, abs=0.004)


def test_the_fastest_candidate_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    user_tiles.cache_clear()
    try:
        shape = (4096, [4096, 1024, 1024])
        for bits in (16, 8, 4):
            assert len(tune.candidates(*shape, 132, bits)) == len(set(tune.candidates(*shape, 132, bits))) > 10
        tile = tune.fastest(FakeWeights(), shape[1], 0.5, 132)  # type: ignore[arg-type]
        assert (tile.block_n, tile.unroll, tile.splits) == (1024, 4, 44)
        older = {("A", 4, 1, 2): GemvTile(16, 1, 1, 1, 1), ("B", 16, 4096, 6144): GemvTile(512, 1, 8, 9, 2)}
        tune.keep(older)
        tune.keep({("B", 16, 4096, 6144): tile})
        assert user_tiles() == {("A", 4, 1, 2): older["A", 4, 1, 2], ("B", 16, 4096, 6144): tile}
        assert [p.name for p in user_tiles_path().parent.iterdir()] == ["tiles.json"]
        monkeypatch.setattr(tuning, "_device_facts", lambda device: ("B", 132))
        assert tuning.gemv_tile(4096, 6144, 1, torch.device("cpu"), torch.bfloat16) == tile
    finally:
        user_tiles.cache_clear()


@pytest.mark.parametrize(
    "main,arguments,fragment",
    [
        (tune.main, ("--device", "cpu"), "expected cuda"),
        (tune.main, ("--model", "Llama-9"), "Llama-9"),
        (gemv.main, ("--models", "Llama-9", "--device", "cpu"), "Llama-9"),
        (gemv.main, ("--rows", "9", "--device", "cpu"), "--rows 9"),
        (gemv.main, ("--input-groups", "--device", "cpu"), "add --quant"),
        (decode.main, ("--input-groups", "--device", "cpu"), "add --quant"),
        (gemv.main, ("--refined", "16", "--quant", "int8", "--device", "cpu"), "add --quant int4"),
        (decode.main, ("--refined", "16", "--quant", "int4", "--device", "cpu"), "random weights"),
        (decode.main, ("--refined", "16", "--random-weights", "Llama-3-8B"), "add --quant int4"),
        (backends.main, ("--backends", "eager,eagle"), "--backends eagle is unknown; expected some of eager, compiled"),
        (decode.main, ("--input-groups", "--quant", "int4", "--tensor-parallel", "2"), "2 loads parts of one"),
        (backends.main, ("--backend", "eager"), "name all of them by --backends"),
        (gemv.main, ("--dtypes", "fp64", "--device", "cpu"), "fp64"),
        (allreduce.main, ("--device", "cpu"), "--tensor-parallel 1"),
    ],
)
def test_mistakes_are_one_line(
    main: Callable[[], None],
    arguments: tuple[str, ...],
    fragment: str,
    call_main: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, err = call_main(main, *arguments)
    assert out == ""
    assert_one_line_error(code, err, fragment)


def test_decoding_is_timed_dense_and_sparse(
    tmp_path: Path, byte_level_tokenizer_json: str, call_main: Callable[..., tuple[int, str, str]]
) -> None:
    save_tiny_model(tiny_config("llama", vocab_size=2048), tmp_path)  # the bench's prompt has tokens up to 2000
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    small = ("--context", "32", "--tokens", "8", "--rounds", "1", "--device", "cpu")
    code, out, err = call_main(decode.main, "--checkpoint", tmp_path, "--sparsities", "0,0.5", *small)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [row["label"] for row in result["rows"]] == ["dense", "50% sparse"]
    assert all(row["tokens_per_s"] > 0 and row["gb_per_s"] > 0 for row in result["rows"])


def test_backends_are_timed_on_the_same_weights(
    tmp_path: Path, byte_level_tokenizer_json: str, call_main: Callable[..., tuple[int, str, str]]
) -> None:
    save_tiny_model(tiny_config("llama", vocab_size=2048), tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    options = ("--backends", "eager,program", "--contexts", "8,16", "--rounds", "1", "--device", "cpu")
    code, out, err = call_main(backends.main, "--checkpoint", tmp_path, *options)
    assert code == 0, err
    *lines, last = out.splitlines()
    rows = json.loads(last)["rows"]
    assert [(row["sparsity"], row["context"]) for row in rows] == [(0.0, 8), (0.0, 16), (0.5, 8), (0.5, 16)]
    for line, row in zip(lines, rows, strict=True):
        eager, program = row["step_ms"]["eager"], row["step_ms"]["program"]
        assert f"program {1e3 / program:.1f} tok/s ({eager / program:.2f}x)" in line
    too_long = (*options, "--contexts", "256")
    code, out, err = call_main(backends.main, "--checkpoint", tmp_path, *too_long)
    assert out == ""
    assert_one_line_error(code, err, "--contexts 256 is too long; expected less than the model's context of")


def test_sums_over_ranks_are_timed() -> None:
    done = run_command("-m", "bench.allreduce", "--tensor-parallel", "2", "--device", "cpu", "--values", "64")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    [row] = found["rows"]
    assert found["ranks"] == 2 and row["values"] == 64 and row["us"]["gloo"] > 0


def test_fitted_thresholds_drop_their_targets(tiny_folder: Path) -> None:
    """Thresholds far off, as calibrating random weights on another text's length gives, are put right."""
    engine = Engine.load(str(tiny_folder), device="cpu", dtype="fp32", sparsity=0.5, compile=False)
    assert engine.plan is not None
    layer = {name: replace(p, threshold=3 * p.threshold) for name, p in engine.plan.layers[0].items()}
    plan = replace(engine.plan, layers=(layer, *engine.plan.layers[1:]))
    prompt = [5 + i % 200 for i in range(40)]

    def worst_miss(used: SparsityPlan) -> float:
        engine.use_plan(used)
        set_counting(engine.model, True)
        list(engine.generate(prompt, SamplingParams(), 61, ignore_eos=True))
        pairs = zip(achieved_sparsity(engine.model), used.layers, strict=True)
        return max(abs(share - planned[name].sparsity) for layer, planned in pairs for name, share in layer.items())

    assert worst_miss(plan) > 0.3
    assert worst_miss(fitted_plan(engine, plan, prompt, tokens=60)) <= 0.08  # a last change moves what comes after it


def test_the_group_size_divides_every_segment() -> None:
    assert gemv.largest_group_size([4096, 1024, 1024]) == 128
    assert gemv.largest_group_size([576, 192, 192]) == 64  # SmolLM2-135M's q, k and v
    with pytest.raises(UserError, match=r"no group size .* divides the widths \[576, 48\]"):
        gemv.largest_group_size([576, 48])


def test_random_weights_of_mixed_bits_are_timed(call_main: Callable[..., tuple[int, str, str]]) -> None:
    model = ("--random-weights", "SmolLM2-135M", "--quant", "int4", "--lm-head", "int4", "--refined", "2")
    small = ("--device", "cpu", "--context", "4", "--tokens", "2", "--rounds", "1", "--sparsities", "0")
    code, out, _ = call_main(decode.main, *model, *small)
    [row] = json.loads(out.splitlines()[-1])["rows"]
    assert code == 0 and row["sparsity"] == 0
    blocks, head = 106_168_320, 49_152 * 576  # weights
    values = 1.5 * blocks / 2 + head / 2  # bytes; 64 of 4 bits are 32, their scale and zero 3
    per_s = values * (1 + 3 / 32) * row["tokens_per_s"] / 1e9
    assert row["gb_per_s"] == pytest.approx(per_s, rel=0.02)


@pytest.mark.parametrize("input_groups", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_shapes_are_timed_too(bits: int, input_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "COLD_BYTES", 4_000_000)
    cold = gemv.ColdWeights(256, [512, 256], 1, torch.bfloat16, torch.device("cpu"), bits, input_groups)
    assert cold.weights[0].by_input == input_groups
    assert cold.count > len(cold.floats) and len({w.values.data_ptr() for w in cold.weights}) == cold.count
    thresholds = gemv.thresholds_for(0.5, [512, 256], torch.device("cpu"))
    assert max(cold.errors(thresholds, [512, 256])) <= 3e-3
    assert cold.sparse_us(thresholds, [512, 256]) > 0


def test_refined_channels_are_timed_beside(
    monkeypatch: pytest.MonkeyPatch, call_main: Callable[..., tuple[int, str, str]]
) -> None:  # fmt: skip
    monkeypatch.setattr(gemv, "COLD_BYTES", 4_000_000)
    monkeypatch.setattr(gemv, "shapes_of", lambda model: {"qkv": (256, [512, 256])})
    monkeypatch.setattr(gemv, "read_bandwidth", lambda device: 1e10)
    cold = gemv.ColdWeights(256, [512, 256], 1, torch.bfloat16, torch.device("cpu"), 4, refined=16)
    assert cold.weights[0].K == 256 and cold.weights[0].values.shape[0] == 272
    options = ("--models", "any", "--quant", "int4", "--refined", "16", "--sparsities", "0.5", "--device", "cpu")
    code, out, err = call_main(gemv.main, *options)
    assert code == 0, err
    [row] = json.loads(out.splitlines()[-1])["rows"]
    assert row["mixed_us"] > 0 and row["mixed_error_fp32"] <= 3e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_shape_is_timed_and_right(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemv, "COLD_BYTES", 4_000_000)
    cold = gemv.ColdWeights(1024, [512, 256], 1, torch.bfloat16, torch.device(device))
    thresholds = gemv.thresholds_for(0.5, [512, 256], torch.device(device))
    sums, rounded = cold.errors(thresholds, [512, 256])
    assert sums <= (1e-6 if device == "cuda" else 3e-3) and rounded <= 3e-3
    assert 0 < cold.sparse_us(thresholds, [512, 256]) < 1e5 and 0 < cold.dense_us() < 1e5


async def answers_of_a_gpu(client: object, model: str, prompt: load.Prompt, *rest: object) -> tuple[str, int, float]:
    """In place of load.ask: the first prompt's text parts, the second gets the third's."""
    return {"a": "one, then", "b": "three", "c": "three"}[prompt.text], 2, 0.1


def test_load_tells_texts_that_part_from_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "ask", answers_of_a_gpu)
    args = load.build_parser().parse_args(["--requests", "60", "--clients", "3", "--hang-up", "0"])
    prompts, alone = [load.Prompt(text, 4) for text in "abc"], ["one two", "two", "three"]
    outcome = asyncio.run(load.attack(args, None, "tiny", prompts, list(alone)))
    assert outcome.swapped == sum("'three' instead of 'two'" in text for text in outcome.different) > 5
    assert len(outcome.different) > outcome.swapped + 5 and not outcome.lost


@pytest.mark.parametrize(
    "different,swapped,options,right",
    [(0, 0, [], True), (3, 0, [], False), (3, 0, ["--may-part"], True), (3, 1, ["--may-part"], False)],
)
def test_when_load_fails(
    different: int, swapped: int, options: list[str], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    async def run(args: object) -> dict[str, object]:
        return {"lost": 0, "different": different, "swapped": swapped, "idle_at_the_end": True}

    monkeypatch.setattr(load, "run", run)
    monkeypatch.setattr(load, "scrape", lambda url, key: {})
    monkeypatch.setattr("sys.argv", ["bench.load", *options])
    if right:
        load.main()
    else:
        with pytest.raises(SystemExit):
            load.main()
