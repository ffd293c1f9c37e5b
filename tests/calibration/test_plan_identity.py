"""A plan fits the weights it was made for, known by content across dtypes and files; others need --force-plan."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from teal.checkpoint.identity import weights_identity
from teal.cli import calibrate, evaluate, generate, quantize
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.plan import SparsityPlan
from tests.conftest import assert_one_line_error

Call = Callable[..., tuple[int, str, str]]
FAST = ("--device", "cpu", "--dtype", "fp32")
TARGET = "0.5"


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield


@pytest.fixture
def original(quantizable_folder: Path, tmp_path: Path, own_cache: None) -> Path:
    return Path(shutil.copytree(quantizable_folder, tmp_path / "original"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def sibling(original: Path, tmp_path: Path) -> Path:
    """The original after a fine-tune of rank 1 that was merged into one projection of one layer."""
    folder = Path(shutil.copytree(original, tmp_path / "sibling"))
    generator = torch.Generator().manual_seed(0)

    def merge(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors["model.layers.1.self_attn.v_proj.weight"]
        b, a = (torch.randn(size, generator=generator) for size in weight.shape)
        weight += 1e-3 * b[:, None] * a

    edit_tensors(folder, merge)
    return folder


@pytest.fixture
def plan(original: Path, tmp_path: Path, call_main: Call) -> Path:
    """calibrate.py's plan for the original."""
    path = tmp_path / "plan.json"
    arguments = ("--checkpoint", original, *FAST, "--sparsity", TARGET, "--sequences", "2", "--length", "64")
    code, _, err = call_main(calibrate.main, *arguments, "-o", path)
    assert code == 0, err
    return path


def run(call_main: Call, folder: Path, *options: object) -> tuple[int, str, str]:
    return call_main(generate.main, "--checkpoint", folder, "--prompt", "The", "--max-new-tokens", "4", *options)


def test_a_plan_says_for_which_weights_it_is(plan: Path, original: Path) -> None:
    weights = SparsityPlan.load(plan).weights
    assert weights is not None
    assert (weights.name, weights.identity) == ("original", weights_identity(original))


@pytest.mark.parametrize("options", [(), ("--quant", "int4"), ("--dtype", "bf16")], ids=["fp32", "int4", "bf16"])
def test_the_own_plan_is_taken_without_a_word(
    options: tuple[str, ...], plan: Path, original: Path, call_main: Call
) -> None:
    code, _, err = run(call_main, original, *FAST, "--plan", plan, *options)
    assert code == 0 and "shapes are compared" not in err, err


@pytest.mark.parametrize("option", ["--plan", "--draft-plan"])
def test_a_siblings_plan_is_refused_by_name(
    option: str, plan: Path, original: Path, sibling: Path, call_main: Call
) -> None:
    options = (*FAST, option, plan, *(("--speculate", "2") if option == "--draft-plan" else ()))
    code, out, err = run(call_main, sibling, *options)
    assert out == ""
    names = (f"original (weights {weights_identity(original)})", f"sibling (weights {weights_identity(sibling)})")
    assert_one_line_error(code, err, "plan.json", *names, "--force-plan")
    code, out, err = run(call_main, sibling, *options, "--force-plan")
    assert code == 0 and out, err


def test_evaluate_refuses_a_siblings_plan(plan: Path, sibling: Path, call_main: Call) -> None:
    arguments = ("--checkpoint", sibling, *FAST, "--plan", plan, "--tokens", "64", "--json")
    code, _, err = call_main(evaluate.main, *arguments)
    assert_one_line_error(code, err, "plan.json", "made for original", "--force-plan")
    code, out, err = call_main(evaluate.main, *arguments, "--force-plan")
    assert code == 0 and len(json.loads(out)["rows"]) == 2, err


def test_a_plan_left_beside_other_weights_is_refused(plan: Path, original: Path, call_main: Call) -> None:
    """As after a fine-tune in place: the file teal-0.5.json is that of the weights before it."""
    shutil.copyfile(plan, original / f"teal-{TARGET}.json")
    edit_tensors(original, lambda t: t["model.layers.2.mlp.up_proj.weight"].mul_(1.01))
    code, _, err = run(call_main, original, *FAST, "--sparsity", TARGET)
    assert_one_line_error(code, err, f"teal-{TARGET}.json", "--force-plan")


def test_engines_refuse_a_siblings_plan(plan: Path, sibling: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}
    engine = Engine.load(str(sibling), sparsity=0.4, **options)
    theirs = SparsityPlan.load(plan)
    with pytest.raises(UserError, match="made for original"):
        engine.use_plan(theirs)
    assert engine.loaded is not None
    with pytest.raises(UserError, match="made for original"):
        Engine.from_loaded(engine.loaded, theirs)
    engine.use_plan(theirs.for_any_model())
    assert Engine.load(str(sibling), plan=str(plan), force_plan=True, **options).plan is not None


def test_force_plan_does_not_force_another_number_of_layers(plan: Path, sibling: Path, call_main: Call) -> None:
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps(content | {"layers": content["layers"][:2]}))
    code, _, err = run(call_main, sibling, *FAST, "--plan", plan, "--force-plan")
    assert_one_line_error(code, err, "2 layers (this model: 3)")


def test_quantized_checkpoints_take_the_plan_of_their_source(
    plan: Path, original: Path, sibling: Path, call_main: Call, tmp_path: Path
) -> None:
    out = tmp_path / "int4"
    code, _, err = call_main(quantize.main, "--checkpoint", original, "--mode", "int4", "-o", out)
    assert code == 0, err
    code, _, err = run(call_main, out, *FAST, "--plan", plan)
    assert code == 0 and "shapes are compared" not in err, err
    code, _, err = call_main(quantize.main, "--checkpoint", sibling, "--mode", "int4", "-o", tmp_path / "other")
    assert code == 0, err
    code, _, err = run(call_main, tmp_path / "other", *FAST, "--plan", plan)
    assert_one_line_error(code, err, "made for original", "not for sibling")


@pytest.mark.parametrize("source", [3, {"name": "x"}, {"name": "x", "identity": 3}])
def test_a_malformed_source_is_refused(source: object, original: Path, call_main: Call, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    assert call_main(quantize.main, "--checkpoint", original, "--mode", "int8", "-o", out)[0] == 0
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["source"] = source
    (out / "config.json").write_text(json.dumps(config))
    code, _, err = run(call_main, out, *FAST)
    assert_one_line_error(code, err, "config.json", "source")


def test_where_nothing_is_known_one_line_says_so(plan: Path, original: Path, call_main: Call, tmp_path: Path) -> None:
    """A plan of version 2; one imported, which knows its layers only; a checkpoint that an older quantize.py wrote."""
    content = json.loads(plan.read_text())
    old = {name: value for name, value in content.items() if name != "weights"} | {"version": 2}
    (tmp_path / "old.json").write_text(json.dumps(old))
    replace(SparsityPlan.load(plan), model={"num_layers": 3}, weights=None).save(tmp_path / "imported.json")
    out = tmp_path / "int8"
    assert call_main(quantize.main, "--checkpoint", original, "--mode", "int8", "-o", out)[0] == 0
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["source"]
    (out / "config.json").write_text(json.dumps(config))
    cases = ((original, tmp_path / "old.json"), (original, tmp_path / "imported.json"), (out, plan))
    for folder, path in cases:
        code, text, err = run(call_main, folder, *FAST, "--plan", path)
        assert code == 0 and text, err
        [line] = [line for line in err.splitlines() if "only shapes are compared" in line]
        assert str(path if folder == original else folder) in line


def test_identity_is_that_of_the_content(original: Path, sibling: Path, tmp_path: Path) -> None:
    """Not of how files are cut or named; every tensor counts, and its dtype."""
    split = tmp_path / "split"
    split.mkdir()
    shutil.copyfile(original / "config.json", split / "config.json")
    weight_map = {}
    with safe_open(original / "model.safetensors", framework="pt") as tensors:
        names = sorted(tensors.keys(), reverse=True)
        for i, name in enumerate(names):
            weight_map[name] = f"part-{i % 3}.safetensors"
        for file in set(weight_map.values()):
            chosen = {name: tensors.get_tensor(name) for name, where in weight_map.items() if where == file}
            save_file(chosen, split / file, {"format": "pt"})
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = weights_identity(original)
    assert weights_identity(split) == before != weights_identity(sibling)
    for name in names:
        changed = Path(shutil.copytree(original, tmp_path / "changed", dirs_exist_ok=True))
        edit_tensors(changed, lambda t, name=name: t[name].add_(0.01))  # type: ignore[misc]
        assert weights_identity(changed) != before, name
    edit_tensors(original, lambda t: t.update({n: v.bfloat16() for n, v in t.items()}))
    assert weights_identity(original) != before
