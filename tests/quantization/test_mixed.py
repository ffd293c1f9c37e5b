"""Folders of mixed bits: from quantize.py to logits, interrupted, damaged and refused ones."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teal.checkpoint.weights import find_shards, load_model
from teal.cli import quantize
from teal.errors import UserError
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import QuantConfig, QuantizedLinear, round_in_two_terms
from teal.model import Transformer
from teal.plan import keep_all_plan
from teal.quantization import gptq, refinement
from teal.quantization.gptq import BlockwiseGptq
from teal.teal_layers import sparse_layers, sparsify
from tests.conftest import ROOT, assert_near, assert_one_line_error, float_tensors, relative_error
from tests.quantized_folders import dequantized_twin
from tests.token_logits import SEQUENCES, logits

Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
MIXED = QuantConfig("mixed", 32, average_bits=5.0)
TEXT = ("--text", ROOT / "README.md", "--sequences", "3", "--length", "100")


@pytest.fixture(scope="module")
def folder(quantizable_folder: Path) -> Path:
    return quantizable_folder


@pytest.fixture(scope="module")
def mixed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 5 bits by rounding to nearest, head included."""
    out = tmp_path_factory.mktemp("mixed") / "out"
    scheme = QuantConfig("mixed", 32, lm_head=True, average_bits=5.0, head_bits=4)
    quantize.quantize_folder(folder, out, scheme, "rtn", SEQUENCES, "cpu")
    return out


def load(folder: Path) -> Transformer:
    return load_model(folder, CPU, torch.float32)


def modules(model: Transformer) -> list[torch.nn.Module]:
    """Of all projections, and the head."""
    own = [block.get_submodule(p.module) for block in model.blocks for p in block.projections()]
    return [*own, model.lm_head]


def test_a_folder_holds_what_was_rounded(folder: Path, mixed: Path) -> None:
    model, dense, stored = load(mixed), load(folder), float_tensors(mixed)
    counts = []
    for module, original in zip(modules(model), modules(dense), strict=True):
        assert isinstance(module, QuantizedLinear) and isinstance(original, torch.nn.Linear)
        refined = torch.empty(0, dtype=torch.int32) if module.refined is None else module.refined
        packed = round_in_two_terms(original.weight.t().contiguous(), refined, 32)
        assert torch.equal(module.dequantized(), dequantize(*packed, refined if len(refined) else None))
        counts.append((len(refined), original.in_features, original.out_features))
    *layers, head = counts
    weights = sum(K * N for _, K, N in layers)
    assert 4.9 < 4 + 4 * sum(E * N for E, _, N in layers) / weights <= 5 and head[0] == 16
    prefix = "model.layers.0.self_attn."
    for name in ("k_proj", "v_proj"):
        assert torch.equal(stored[f"{prefix}{name}.refined"], stored[f"{prefix}q_proj.refined"])
    scheme = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert scheme["version"] == 2 and scheme["mode"] == "mixed" and scheme["average_bits"] == 5.0
    assert [*itertools.chain(*scheme["refined"]), scheme["refined_head"]] == [E for E, _, _ in counts]


def test_it_computes_what_its_weights_say(folder: Path, mixed: Path) -> None:
    model = load(mixed)
    assert_near("logits of the dequantized twin", logits(model), logits(dequantized_twin(folder, model)), 1e-5)


def test_sparse_decoding_is_that_of_the_dequantized_weights(folder: Path, mixed: Path) -> None:
    model = load(mixed)
    reference = dequantized_twin(folder, model)
    dense = logits(model)
    for m in (model, reference):
        sparsify(m, keep_all_plan(m.config))
        for module in itertools.chain(*sparse_layers(m)):
            module.set_thresholds([0.5] * len(module.names))
    assert_near("sparse logits", logits(model), logits(reference), 1e-5)
    assert relative_error(logits(model), dense) > 0.01, "logits: no entry was dropped"


def test_an_energetic_channel_is_refined(folder: Path, tmp_path: Path) -> None:
    """Of layer 1's normed input: its norm's weight is large there, and small elsewhere in the layer."""
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    tensors = load_file(source / "model.safetensors")
    norm = tensors["model.layers.1.post_attention_layernorm.weight"]
    norm[11] = 8 * norm.max()
    save_file(tensors, source / "model.safetensors")
    quantize.quantize_folder(source, tmp_path / "out", MIXED, "rtn", SEQUENCES, "cpu")
    stored = float_tensors(tmp_path / "out")
    assert 11 in stored["model.layers.1.mlp.gate_proj.refined"].tolist()


def test_gptq_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads as it was rounded; an interrupted run goes on, with the channels chosen before, and gives the same."""
    rounded: list[Tensor] = []
    original, original_layer, measured = gptq.gptq, BlockwiseGptq.layer, []

    def noting(*arguments: Any) -> Any:
        packed = original(*arguments)
        rounded.append(dequantize(*packed, arguments[-1] if len(arguments[-1]) else None))
        return packed

    def failing(self: BlockwiseGptq, i: int) -> Any:
        if i == 2:
            raise KeyboardInterrupt
        return original_layer(self, i)

    def measuring(*arguments: Any) -> Any:
        measured.append(arguments)
        return energies(*arguments)

    energies = refinement.channel_energies
    whole, again = tmp_path / "whole", tmp_path / "again"
    monkeypatch.setattr(gptq, "gptq", noting)
    quantize.quantize_folder(folder, whole, MIXED, "gptq", SEQUENCES, "cpu")
    for module, expected in zip(modules(load(whole))[:-1], rounded, strict=True):
        assert isinstance(module, QuantizedLinear) and torch.equal(module.dequantized(), expected)
    monkeypatch.setattr(refinement, "channel_energies", measuring)
    with monkeypatch.context() as patch:
        patch.setattr(BlockwiseGptq, "layer", failing)
        with pytest.raises(KeyboardInterrupt):
            quantize.quantize_folder(folder, again, MIXED, "gptq", SEQUENCES, "cpu")
    quantize.quantize_folder(folder, again, MIXED, "gptq", SEQUENCES, "cpu")
    assert len(measured) == 1
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in again.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_command(folder: Path, tmp_path: Path, call_main: Command) -> None:
    """mixed lies between int4 and int8, takes a head of its kind, and goes over its own output with --force."""
    errors = []
    for mode in (("int4",), ("mixed", "--lm-head", "mixed"), ("mixed", "--bits", "6"), ("int8",)):
        out = tmp_path / "out"
        command = ("--checkpoint", folder, "--mode", *mode, "--method", "gptq", *TEXT, "--device", "cpu", "-o", out)
        code, stdout, err = call_main(quantize.main, *command, "--force")
        assert code == 0 and stdout == "", err
        name = {"int4": "int4 by", "--lm-head": "mixed (4.25 bits) by", "--bits": "mixed (6 bits) by"}
        assert name.get(mode[-2] if len(mode) > 1 else mode[0], "int8 by") in err
        model = load(out)
        assert isinstance(model.lm_head, QuantizedLinear) == ("--lm-head" in mode)
        assert not any(path.name in (quantize.MARKER, quantize.REFINED) for path in out.iterdir())
        if "--lm-head" not in mode:
            errors.append(relative_error(logits(model), logits(load(folder))))
    assert errors[0] > 1.2 * errors[1] and errors[1] > 1.2 * errors[2], errors


@pytest.mark.parametrize(
    "options,fragment",
    [
        (("--mode", "mixed", "--bits", "3.9"), "--bits 3.9 is out of range; expected 4 <= bits <= 8"),
        (("--mode", "mixed", "--bits", "nan"), "--bits nan is out of range"),
        (("--mode", "int4", "--bits", "4.25"), "--bits 4.25 goes with --mode mixed"),
        (("--mode", "mixed", "--method", "hqq"), "--method hqq does not go with --mode mixed"),
        (("--mode", "mixed", "--grouping", "input"), "--mode mixed needs groups along the output"),
        (("--mode", "int4", "--lm-head", "mixed"), "--lm-head mixed goes with --mode mixed"),
    ],
    ids=["low", "nan", "without", "hqq", "input", "head"],
)
def test_mistakes_are_one_line(
    options: tuple[str, ...], fragment: str, folder: Path, tmp_path: Path, call_main: Command
) -> None:
    code, _, err = call_main(quantize.main, "--checkpoint", folder, *options, "-o", tmp_path / "out")
    assert_one_line_error(code, err, fragment)
    assert not (tmp_path / "out").exists()


Change = Callable[[dict[str, Any]], None]
CONFIG_DAMAGES: dict[str, tuple[Change, str]] = {
    "layers": (lambda c: c.update(refined=c["refined"][:-1]), "expected 4 counts for each of 3 layers"),
    "modules": (lambda c: c["refined"][0].pop(), "expected 4 counts for each of 3 layers"),
    "too many": (lambda c: c["refined"][1].__setitem__(3, 97), "layer 1 down has 97; expected at most 96"),
    "others": (lambda c: c["refined"][1].__setitem__(3, 5), "config.json says it should be"),
    "negative": (lambda c: c["refined"][1].__setitem__(0, -16), "-16 are not usable"),
    "no count": (lambda c: c["refined"][1].__setitem__(0, "all"), "'all' are not usable"),
    "no list": (lambda c: c.update(refined=7), "7 is not usable"),
    "head": (lambda c: c.update(refined_head=65), "refined_head is 65; expected at most 64"),
    "head bits": (lambda c: c.update(head_bits=5), "head_bits 5 is not usable"),
    "head of 8": (lambda c: c.update(head_bits=8), "refined_head is 16; expected 0"),
    "no head": (lambda c: c.update(lm_head=False), "refined_head is 16; expected 0"),
    "bits": (lambda c: c.update(average_bits="many"), "bits many is out of range"),
    "version": (lambda c: c.update(version=1), "mode mixed has version 1; expected 2"),
    "older mode": (lambda c: c.update(mode="int4"), "mode int4 has no refined channels"),
}


@pytest.mark.parametrize("name", CONFIG_DAMAGES)
def test_a_damaged_config_is_one_line(name: str, mixed: Path, tmp_path: Path) -> None:
    change, fragment = CONFIG_DAMAGES[name]
    broken = shutil.copytree(mixed, tmp_path / "broken")
    raw = json.loads((broken / "config.json").read_text())
    change(raw["quantization_config"])
    (broken / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load(broken)
    assert fragment in str(error.value) and str(broken) in str(error.value) and "\n" not in str(error.value)


def other(channels: Tensor) -> int:
    """A channel that is not among them."""
    return next(i for i in range(64) if i not in channels.tolist())


LIST_DAMAGES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "differs": (lambda t: torch.tensor(sorted({*t.tolist()} - {int(t[0])} | {other(t)})), "differs from"),
    "falling": (lambda t: t.flip(0), "expected rising order"),
    "beyond": (lambda t: torch.cat([t[:-1], torch.tensor([64])]), "expected 0 to 63"),
    "negative": (lambda t: torch.cat([torch.tensor([-1]), t[1:]]), "expected 0 to 63"),
    "short": (lambda t: t[:-1], "config.json says it should be"),
}


@pytest.mark.parametrize("name", LIST_DAMAGES)
def test_damaged_lists_are_one_line(name: str, mixed: Path, tmp_path: Path) -> None:
    change, fragment = LIST_DAMAGES[name]
    broken = shutil.copytree(mixed, tmp_path / "broken")
    for shard in find_shards(broken):
        tensors = load_file(shard)
        for key in (k for k in list(tensors) if k.endswith(("v_proj.refined", "lm_head.refined"))):
            if name != "differs" or "lm_head" not in key:
                tensors[key] = change(tensors[key]).int()
        save_file(tensors, shard)
    with pytest.raises(UserError) as error:
        load(broken)
    assert fragment in str(error.value) and str(broken) in str(error.value) and "\n" not in str(error.value)


def test_readers_of_version_1_meet_a_version_that_they_refuse() -> None:
    assert QuantConfig("int4", 32).as_json() == {
        "quant_method": "teal", "version": 1, "mode": "int4", "group_size": 32, "lm_head": False, "grouping": "output"
    }  # fmt: skip
    assert MIXED.as_json()["version"] == 2
