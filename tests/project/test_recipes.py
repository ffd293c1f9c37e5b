"""The recipes of docs/ (add-a-….md): the files they list exist, are few, and are all that what they teach needs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.checkpoint.families import FAMILIES
from teal.checkpoint.weights import load_model
from teal.model import KVCache
from tests.conftest import ROOT, save_tiny_model, tiny_config

MOST_FILES = {"add-a-model.md": 4, "add-a-format.md": 8, "add-a-sampling-parameter.md": 4, "add-a-kernel.md": 4}
EXAMPLES = {  # what gives away, in code, that a file knows of the recipe's example: of the format, its integers
    "add-a-model.md": r"\"olmo2\"|qk_norm_full",
    "add-a-format.md": r"& 15\b|\bBITS == [48]|\bbits == [48]",
    "add-a-sampling-parameter.md": r"\bmin[_-]p\b",
    "add-a-kernel.md": r"import reduce_partials\b|reduce_partials = make_op\b",
}
BESIDE = {  # files that know of it, too, but that a new one does without
    "add-a-model.md": {
        "teal/architectures.py",  # shapes, to measure speed with
        "teal/checkpoint/gguf_families.py",  # the family's GGUF files
        "teal/decoding/cpu_program.py",  # a CPU's step, which leaves to the modules what it does not know
    },
    "add-a-format.md": {
        "kernels/gemv/gather_tensor_core.py",  # the fast forms of 4 and 8 bits
        "kernels/gemv/gather_tensor_core_rows.py",
        "kernels/gemv/gather_tensor_core_wide.py",
        "kernels/gemv/lane_loads.py",
        "kernels/gemv/launch.py",  # which reads bytes as words
        "kernels/program/shapes.py",  # of a kernel that refuses what it does not know
        "kernels/cpu/blocks.cpp",  # GGUF's types, a layout apart
        "kernels/cpu/widen_blocks.cpp",
        "kernels/formats/blocks.py",
        "teal/quantization/gptq.py",  # better rounding
        "teal/quantization/half_quadratic.py",
    },
    "add-a-kernel.md": {"kernels/sparse_linear.py"},  # a second caller
}


def listed(recipe: str) -> list[str]:
    """The files under "## Files" of a recipe."""
    text = (ROOT / "docs" / recipe).read_text(encoding="utf-8")
    [files] = re.findall(r"^## Files\n\n```files\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return files.split()


def files_with(pattern: str) -> set[str]:
    """Files of what users run, tests and benches aside, in which pattern occurs."""
    paths = {path.resolve() for path in ROOT.rglob("*") if path.suffix in (".py", ".cpp") and path.is_file()}
    names = {path.relative_to(ROOT).as_posix(): path for path in paths if path.is_relative_to(ROOT)}
    aside = (".", "tests/", "bench/", "build/")
    return {
        name
        for name, path in names.items()
        if not name.startswith(aside) and re.search(pattern, path.read_text(encoding="utf-8"))
    }


def test_every_recipe_is_checked() -> None:
    assert {path.name for path in (ROOT / "docs").glob("add-a-*.md")} == set(MOST_FILES) == set(EXAMPLES)


@pytest.mark.parametrize("recipe", MOST_FILES)
def test_a_recipe_lists_few_files_which_exist(recipe: str) -> None:
    files = listed(recipe)
    assert len(set(files)) == len(files) <= MOST_FILES[recipe]
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert any(name.startswith("tests/") for name in files), "no test is listed"


@pytest.mark.parametrize("recipe", EXAMPLES)
def test_the_example_is_in_no_other_file(recipe: str) -> None:
    own = {name for name in listed(recipe) if not name.startswith("tests/")}
    assert files_with(EXAMPLES[recipe]) - BESIDE.get(recipe, set()) == own


def test_a_family_like_llama_is_a_change_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row of the table in families.py its checkpoint is read and computed; everything else follows from them."""
    expected_model: Any = save_tiny_model(tiny_config("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "newcomer"}))
    monkeypatch.setitem(FAMILIES, "newcomer", FAMILIES["llama"])
    tokens = torch.arange(20)[None]
    model = load_model(tmp_path, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        expected = expected_model(tokens).logits
        cache = KVCache(model.config, 1, 32, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(model(tokens, torch.arange(20)[None], cache), expected, rtol=1e-4, atol=1e-4)
