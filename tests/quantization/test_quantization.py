"""Quantized checkpoints: the way from quantize.py to text, interrupted, damaged and refused ones."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from teal.checkpoint.weights import find_shards, load_model
from teal.cli import calibrate, evaluate, generate, quantize
from teal.errors import UserError
from teal.kernels.formats.packing import dequantize
from teal.layers.phase import decoding
from teal.layers.quantized_linear import (
    BITS,
    QuantConfig,
    QuantizedLinear,
    round_to_nearest,
    use_quantized_linears,
)
from teal.model import KVCache, Transformer
from teal.quantization import shards
from teal.quantization.gptq import BlockwiseGptq
from tests.conftest import ROOT, assert_near, assert_one_line_error, file_size_limit, relative_error
from tests.quantized_folders import TEXT_OPTIONS, dequantized_twin

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(quantizable_folder: Path) -> Path:
    return quantizable_folder


@torch.inference_mode()
def logits(model: Transformer, tokens: int = 30) -> torch.Tensor:
    """Of a prompt of 10 tokens and then one token a call."""
    ids = torch.randint(0, 300, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = KVCache(model.config, 1, tokens, torch.device("cpu"), torch.float32)
    at = torch.arange(tokens)[None]
    parts = [model(ids[:, :10], at[:, :10], cache)]
    with decoding(model):
        parts += [model(ids[:, i : i + 1], at[:, i : i + 1], cache) for i in range(10, tokens)]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("mode,head", [("int8", "none"), ("int4", "none"), ("int4", "int8")])
def test_a_quantized_folder_computes_what_its_weights_say(
    folder: Path, tmp_path: Path, call_main: Command, mode: str, head: str
) -> None:  # fmt: skip
    out = tmp_path / "out"
    code, stdout, err = call_main(quantize.main, "--checkpoint", folder, "--mode", mode, "--lm-head", head, "-o", out)
    assert code == 0 and stdout == "" and f"{mode} by rtn, groups of 32 along the output" in err, err
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["out"]
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    model = load_model(out, torch.device("cpu"), torch.float32)
    assert isinstance(model.lm_head, QuantizedLinear) == (head == "int8")
    assert_near("logits of the dequantized twin", logits(model), logits(dequantized_twin(folder, model)), 1e-5)
    dense = logits(load_model(folder, torch.device("cpu"), torch.float32))
    assert_near("logits of the dense model", logits(model), dense, 0.1 if mode == "int8" else 0.9)


def test_every_command_takes_a_quantized_folder(folder: Path, tmp_path: Path, call_main: Command) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    assert call_main(quantize.main, "--checkpoint", folder, "--mode", "int4", "-o", out)[0] == 0
    options = ("--checkpoint", out, "--device", "cpu", "--dtype", "fp32")
    code, _, err = call_main(
        calibrate.main, *options, "--sparsity", "0.5", "--sequences", "2", "--length", "64", "-o", plan
    )
    assert code == 0, err
    code, text, err = call_main(
        generate.main, *options, "--prompt", "The", "--plan", plan, "--max-new-tokens", "8", "--stats"
    )
    assert code == 0 and text.strip(), err
    code, table, err = call_main(evaluate.main, *options, "--plan", plan, "--tokens", "128", "--json")
    assert code == 0 and "perplexity" in table, err


def test_rounding_at_load_is_what_quantize_writes(folder: Path, tmp_path: Path, call_main: Command) -> None:
    quantize.quantize_folder(folder, tmp_path / "out", QuantConfig("int4", 32))
    code, written, err = call_main(generate.main, "--checkpoint", tmp_path / "out", *TEXT_OPTIONS)
    assert code == 0, err
    assert call_main(generate.main, "--checkpoint", folder, "--quant", "int4", *TEXT_OPTIONS)[1] == written
    sparse = ("--quant", "int4", "--sparsity", "0.3", *TEXT_OPTIONS)
    assert call_main(generate.main, "--checkpoint", folder, *sparse)[0] == 0
    code, _, err = call_main(generate.main, "--checkpoint", tmp_path / "out", "--quant", "int8", *TEXT_OPTIONS)
    assert_one_line_error(code, err, "--quant int8", "quantized already")


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_groups_along_the_input(folder: Path, tmp_path: Path, call_main: Command, mode: str) -> None:
    out = tmp_path / "out"
    options = ("--mode", mode, "--grouping", "input", "--lm-head", "int8")
    assert call_main(quantize.main, "--checkpoint", folder, *options, "-o", out)[0] == 0
    name = "model.layers.1.mlp.down_proj.weight"
    [original] = [load_file(shard)[name] for shard in find_shards(folder)]
    model, dense = (load_model(path, torch.device("cpu"), torch.float32) for path in (out, folder))
    down, head = model.blocks[1].feed_forward.down, model.lm_head
    assert isinstance(down, QuantizedLinear) and down.scales.shape == (96 // 32, 64)
    assert isinstance(head, QuantizedLinear) and head.scales.shape == (64, head.out_features // 32)
    assert torch.equal(down.dequantized(), dequantize(*round_to_nearest(original, BITS[mode], 32)).t())
    use_quantized_linears(dense, QuantConfig(mode, 32, True, "input"), fill=True)
    assert torch.equal(logits(model), logits(dense))


def test_an_interrupted_run_goes_on_and_gives_the_same(folder: Path, tmp_path: Path) -> None:
    scheme = QuantConfig("int4", 32)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    quantize.quantize_folder(folder, whole, scheme)
    original, calls = shards.quantized_tensors, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "quantized_tensors", failing)
        with pytest.raises(KeyboardInterrupt):
            quantize.quantize_folder(folder, resumed, scheme)
        assert not resumed.exists()
        quantize.quantize_folder(folder, resumed, scheme)
    assert len(calls) == 5  # two of the four shards were there; the interrupted one was made again
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in resumed.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name


@pytest.mark.parametrize("grouping", ["output", "input"])
def test_gptq_folder(folder: Path, tmp_path: Path, call_main: Command, grouping: str) -> None:
    """Nearer to the dense model than rounding on the text it saw, and the same after an interruption."""
    options = ("--sequences", "3", "--length", "100", "--text", ROOT / "README.md", "--grouping", grouping)
    for method in ("rtn", "hqq", "gptq"):
        arguments = ("--checkpoint", folder, "--mode", "int4", "--method", method, *options, "-o", tmp_path / method)
        code, _, err = call_main(quantize.main, *arguments)
        assert code == 0 and f"int4 by {method}" in err, err
    args = quantize.build_parser().parse_args(["--mode", "int4", *map(str, options), "-o", "x"])
    sequences = quantize.calibration_sequences(args, folder, 400)
    positions = torch.arange(100)[None]

    def on_text(path: Path) -> torch.Tensor:
        model = load_model(path, torch.device("cpu"), torch.float32)
        cache = KVCache(model.config, 1, 100, torch.device("cpu"), torch.float32)
        with torch.inference_mode():
            return torch.cat([model(ids[None], positions, cache) for ids in sequences])

    dense = on_text(folder)
    gptq, rtn = (relative_error(on_text(tmp_path / method), dense) for method in ("gptq", "rtn"))
    assert gptq < 0.9 * rtn, f"logits: gptq {gptq:.3f}, rtn {rtn:.3f}"

    original = BlockwiseGptq.layer

    def failing(self: BlockwiseGptq, i: int) -> Any:
        if i == 2:
            raise KeyboardInterrupt
        return original(self, i)

    again, how = tmp_path / "again", (QuantConfig("int4", 32, grouping=grouping), "gptq", sequences, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockwiseGptq, "layer", failing)
        with pytest.raises(KeyboardInterrupt):
            quantize.quantize_folder(folder, again, *how)
    quantize.quantize_folder(folder, again, *how)
    for path in (tmp_path / "gptq").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_leftovers_of_another_job_are_not_used(folder: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    quantize.quantize_folder(folder, other, QuantConfig("int8", 32))
    shutil.move(other, tmp_path / ".out.part")
    (tmp_path / ".out.part" / "progress.json").write_text(json.dumps({"source": "another"}))
    quantize.quantize_folder(folder, out, QuantConfig("int4", 32))
    assert {t.dtype for t in load_file(find_shards(out)[0]).values()} == {torch.int32, torch.uint8, torch.float32}


def damaged(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of folder with changed weights."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_mistakes_are_one_line_and_leave_nothing(
    folder: Path, tiny_folder: Path, tmp_path: Path, call_main: Command
) -> None:
    out, done = tmp_path / "out", tmp_path / "done"
    quantize.quantize_folder(folder, done, QuantConfig("int8", 32))

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = math.inf

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()

    options = {
        "model.layers.1.self_attn.o_proj.weight holds NaN or infinity": (
            damaged(folder, tmp_path / "inf", poison),
            out,
        ),
        "expected one dtype": (damaged(folder, tmp_path / "mixed", mix), out),
        "is quantized already": (done, out),
        "exists; remove it": (folder, done),
        "is the checkpoint itself": (folder, folder),
        "no group size divides": (tiny_folder, out),
        "no such folder": (tmp_path / "missing", out),
    }
    for message, (source, target) in options.items():
        code, stdout, err = call_main(quantize.main, "--checkpoint", source, "--mode", "int4", "-o", target)
        assert stdout == ""
        assert_one_line_error(code, err, message)
        assert not out.exists()
    code, _, err = call_main(quantize.main, "--checkpoint", folder, "--mode", "int4", "--group-size", "64", "-o", out)
    assert_one_line_error(code, err, "--group-size 64", "k and v width 32", "expected one of 32")
    code, _, err = call_main(
        quantize.main,
        "--checkpoint",
        folder,
        "--mode",
        "int4",
        "--method",
        "gptq",
        "--text",
        tmp_path / "no",
        "-o",
        out,
    )
    assert_one_line_error(code, err, str(tmp_path / "no"))
    code, _, err = call_main(quantize.main, "--checkpoint", folder, "--mode", "int3", "-o", out)
    assert_one_line_error(code, err, "int3")
    assert call_main(quantize.main, "--checkpoint", folder, "--mode", "int4", "--force", "-o", done)[0] == 0
    assert json.loads((done / "config.json").read_text())["quantization_config"]["mode"] == "int4"


@pytest.mark.parametrize(
    "change,fragment",
    [
        ({"version": 99}, "version 99"),
        ({"quant_method": "bitnet"}, "'bitnet' is not supported"),
        ({"mode": "int2"}, "int2"),
        ({"group_size": 5}, "group size 5"),
    ],
)
def test_foreign_schemes_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any], fragment: str) -> None:
    quantize.quantize_folder(folder, tmp_path / "out", QuantConfig("int8", 32))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=fragment):
        load_model(tmp_path / "out", torch.device("cpu"), torch.float32)


def test_full_disk_is_one_line_and_the_next_run_succeeds(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "quantize.py",
        "--checkpoint",
        str(folder),
        "--mode",
        "int8",
        "-o",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=file_size_limit(20_000))
    assert_one_line_error(done.returncode, done.stderr, "disk is full")
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_model(tmp_path / "out", torch.device("cpu"), torch.float32)


def test_options_have_help() -> None:
    assert all(action.help for action in quantize.build_parser()._actions)
