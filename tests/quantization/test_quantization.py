"""Quantized weights: layout, rounding, products against plain fp32, and the way from quantize.py to text."""

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
from teal.kernels.formats.packing import dequantize, pack_int4, unpack_int4
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.reference import sparse_linear_reference
from teal.kernels.sparse_linear import sparse_linear, sparse_linear_op
from teal.layers.phase import decoding
from teal.layers.quantized_linear import (
    BITS,
    QuantConfig,
    QuantizedLinear,
    pick_group_size,
    round_to_nearest,
    use_quantized_linears,
)
from teal.model import KVCache, Transformer
from teal.quantization.gptq import BlockwiseGptq, gptq, gptq_input_groups
from teal.quantization.half_quadratic import half_quadratic
from tests.conftest import (
    ROOT,
    assert_one_line_error,
    file_size_limit,
    relative_error,
)

Command = Callable[..., tuple[int, str, str]]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(scope="module")
def folder(quantizable_folder: Path) -> Path:
    return quantizable_folder


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_packing_is_undone_by_unpacking(group_size: int) -> None:
    values = torch.randint(0, 16, (5, 256), generator=torch.Generator().manual_seed(0))
    words = pack_int4(values, group_size)
    assert words.dtype == torch.int32 and words.shape == (5, 32)
    assert torch.equal(unpack_int4(words, group_size), values.to(torch.uint8))
    # the documented place of a column: nibble j of word w of group g
    g, j, w = 1, 5, 2
    column = g * group_size + j * group_size // 8 + w
    assert int(words[3, g * group_size // 8 + w]) >> 4 * j & 15 == int(values[3, column])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_errs_by_half_a_step(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(20, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, scales, zeros = round_to_nearest(weight, bits, 32)
    assert scales.dtype == dtype and (zeros is None) == (bits == 8)
    exact = dequantize(values, scales.float(), zeros)
    steps = scales.float().repeat_interleave(32, dim=1)
    # int4: the zero point is rounded as well, which can cut off half a step at one end
    assert ((exact - weight.float()).abs() <= steps * (0.51 if bits == 8 else 1.01)).all()
    assert relative_error(exact, weight.float()) <= (0.01 if bits == 8 else 0.11)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 1e-30])
def test_constant_rows_are_exact(value: float, bits: int) -> None:
    weight = torch.full((3, 64), value)
    values, scales, zeros = round_to_nearest(weight, bits, 32)
    assert torch.allclose(dequantize(values, scales, zeros), weight, rtol=1e-6, atol=1e-29)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("B", [1, 2, 4, 9])
def test_products_equal_those_of_the_dequantized_weight(
    B: int, group_size: int, bits: int, dtype: torch.dtype
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, 77, generator=generator).to(dtype)
    weight = round_to_nearest(torch.randn(77, 1152, generator=generator).to(dtype), bits, group_size)
    values, scales, zeros = weight
    exact = dequantize(values, scales.float(), zeros)
    thresholds, segments = torch.tensor([0.3, 0.9, 0.0]), [640, 384, 128]
    actual = sparse_linear(x, values, thresholds, segments, scales, zeros)
    expected = sparse_linear_reference(x, exact, thresholds, segments)
    assert actual.dtype == dtype and relative_error(actual, expected) <= TOLERANCE[dtype]
    dense = quantized_matmul(x, *weight)
    assert relative_error(dense, x.float() @ exact) <= 2 * TOLERANCE[dtype]


def test_a_product_in_several_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 16), torch.randn(16, 320)
    packed = round_to_nearest(weight, 4, 32)
    whole = quantized_matmul(x, *packed)
    monkeypatch.setattr("teal.kernels.quantized_matmul.COLUMNS_AT_ONCE", 96)
    assert relative_error(quantized_matmul(x, *packed), whole) <= 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_product_with_many_rows(bits: int) -> None:
    x, packed = torch.randn(3, 16), round_to_nearest(torch.randn(16, 320), bits, 32)
    compiled = torch.compile(quantized_matmul, fullgraph=True)(x, *packed)
    assert relative_error(compiled, x @ dequantize(*packed)) <= 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_that_x_drops_are_never_read(bits: int) -> None:
    x = torch.randn(1, 64)
    values, scales, zeros = round_to_nearest(torch.randn(64, 96), bits, 32)
    limits = torch.tensor([0.7])
    expected = sparse_linear_reference(x, dequantize(values, scales, zeros), limits, [96])
    scales[(x.abs() < limits)[0]] = math.nan
    assert relative_error(sparse_linear(x, values, limits, [96], scales, zeros), expected) <= 2e-6


def test_bad_quantized_arguments_are_refused() -> None:
    x, limits = torch.ones(1, 4), torch.zeros(1)
    values, scales, zeros = round_to_nearest(torch.ones(4, 64), 4, 32)
    bad = {
        "zeros: expected": (x, values, limits, [64], scales, None),
        "expected the same": (x.bfloat16(), values, limits, [64], scales, zeros),
        "expected floats": (x, values, limits, [64], scales[:3], zeros),
        "expected uint8": (x, values, limits, [64], scales, scales),
        "no multiples of the group size": (x, values, torch.zeros(2), [48, 16], scales, zeros),
        "do not cover": (x, values, limits, [32], scales, zeros),
        "expected int8 or int32": (x, values.to(torch.int64), limits, [64], scales, zeros),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError) as error:
            sparse_linear(*arguments)
        assert message in str(error.value), message


def test_opcheck() -> None:
    values, scales, zeros = round_to_nearest(torch.randn(16, 64), 4, 32)
    torch.library.opcheck(sparse_linear_op, (torch.randn(1, 16), values, torch.zeros(1), [64], scales, zeros))


def dequantized_twin(folder: Path, quantized: Transformer) -> Transformer:
    """The dense model of folder with the weights that quantized stands for."""
    twin = load_model(folder, torch.device("cpu"), torch.float32)
    modules = dict(quantized.named_modules())
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear) and isinstance(modules[name], QuantizedLinear):
            module.weight = torch.nn.Parameter(modules[name].dequantized().t(), requires_grad=False)
    return twin


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
    assert relative_error(logits(model), logits(dequantized_twin(folder, model))) <= 1e-5
    dense = logits(load_model(folder, torch.device("cpu"), torch.float32))
    assert relative_error(logits(model), dense) <= (0.1 if mode == "int8" else 0.9)


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
    options = (
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--prompt",
        "The lobster",
        "--max-new-tokens",
        "20",
        "--ignore-eos",
    )
    quantize.quantize_folder(folder, tmp_path / "out", QuantConfig("int4", 32))
    code, written, err = call_main(generate.main, "--checkpoint", tmp_path / "out", *options)
    assert code == 0, err
    assert call_main(generate.main, "--checkpoint", folder, "--quant", "int4", *options)[1] == written
    assert call_main(generate.main, "--checkpoint", folder, "--quant", "int4", "--sparsity", "0.3", *options)[0] == 0
    code, _, err = call_main(generate.main, "--checkpoint", tmp_path / "out", "--quant", "int8", *options)
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
    original, calls = quantize._quantized_tensors, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "_quantized_tensors", failing)
        with pytest.raises(KeyboardInterrupt):
            quantize.quantize_folder(folder, resumed, scheme)
        assert not resumed.exists()
        quantize.quantize_folder(folder, resumed, scheme)
    assert len(calls) == 5  # two of the four shards were there; the interrupted one was made again
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in resumed.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_changes_the_product_less_than_rounding(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)  # correlated channels
    x[:, 7] = 0  # a channel that no token uses
    weight = torch.randn(96, 128, generator=generator)
    nearest, better = (
        dequantize(*packed) for packed in (round_to_nearest(weight, bits, 32), gptq(weight, x.t() @ x, bits, 32))
    )
    assert relative_error(x @ better, x @ weight) <= 0.8 * relative_error(x @ nearest, x @ weight)
    assert relative_error(better[7], nearest[7]) <= 0.2


@pytest.mark.parametrize("bits", [8, 4])
def test_gptq_with_groups_along_the_input(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight = torch.randn(96, 128, generator=generator)
    nearest = dequantize(*round_to_nearest(weight.t().contiguous(), bits, 32)).t()
    better = dequantize(*gptq_input_groups(weight, x.t() @ x, bits, 32))
    assert relative_error(x @ better, x @ weight) <= 0.8 * relative_error(x @ nearest, x @ weight)
    of_independent_channels = dequantize(*gptq_input_groups(weight, torch.eye(96), bits, 32))
    assert torch.equal(of_independent_channels, nearest)  # rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_hqq_lowers_the_norm_it_is_for_in_every_group(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.distributions.StudentT(3.0).sample((24, 192)).to(dtype)
    weight[5, 64:128], weight[6, :64] = 0.0, torch.rand(64, generator=generator).to(dtype) + 3.0

    def norms(packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        exact = dequantize(packed[0], packed[1].float(), packed[2])
        return ((exact - weight.float()).abs() ** 0.7).view(24, 3, 64).sum(-1)

    found, rounded = norms(half_quadratic(weight, bits, 64)), norms(round_to_nearest(weight, bits, 64))
    assert (found <= rounded * (1 + 1e-6)).all() and found.sum() <= (0.98 if bits == 4 else 1.0) * rounded.sum()


def test_gptq_of_independent_channels_is_rounding() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for found, expected in zip(gptq(weight, torch.eye(64), 4, 32), round_to_nearest(weight, 4, 32), strict=True):
        assert found is not None and expected is not None and torch.equal(found, expected)


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
    assert relative_error(on_text(tmp_path / "gptq"), dense) < 0.9 * relative_error(on_text(tmp_path / "rtn"), dense)

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


def test_group_sizes() -> None:
    from teal.checkpoint.presets import PRESETS

    assert pick_group_size(PRESETS["Llama-3-8B"], None) == 128
    assert pick_group_size(PRESETS["SmolLM2-135M"], None) == 64
    assert pick_group_size(PRESETS["SmolLM2-135M"], 32) == 32
    with pytest.raises(UserError, match="128 does not fit the q width 576"):
        pick_group_size(PRESETS["SmolLM2-135M"], 128)


@pytest.mark.parametrize(
    "change,fragment",
    [
        ({"version": 99}, "version 99"),
        ({"quant_method": "fp8"}, "'fp8' is not supported"),
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
