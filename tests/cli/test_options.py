"""Options are declared once: a command line says what the library's dataclasses hold, errors and defaults too."""

import argparse
import ast
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from teal.cli import command_line as cli
from teal.cli import options
from teal.errors import ParameterError, UserError
from teal.options import DTYPE_NAMES, QUANTS, DraftOptions, ModelOptions, SamplingParams, check_bias
from tests.conftest import ROOT, assert_one_line_error

COMMANDS = ("generate", "serve", "calibrate", "quantize", "evaluate")
Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = cli.Parser("")
    options.add_decode_arguments(parser)
    options.add_draft_arguments(parser)
    options.add_sampling_arguments(parser)
    return parser


def test_a_command_line_without_options_is_the_defaults(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args([])
    assert options.model_options(args) == ModelOptions()
    assert options.sampling_params(args) == SamplingParams()
    assert options.draft_options(args) is None
    assert options.draft_options(parser.parse_args(["--speculate-lookup"])) == DraftOptions(lookup=True)


def test_every_field_has_an_option_that_sets_it(parser: argparse.ArgumentParser) -> None:
    given: dict[str, tuple[list[str], Any]] = {
        "checkpoint": (["--checkpoint", "x"], "x"),
        "random_weights": (["--random-weights", "smollm2-135m"], "smollm2-135m"),
        "adapter": (["--adapter", "x"], "x"),
        "sparsity": (["--sparsity", "0.5"], 0.5),
        "plan": (["--plan", "p.json"], "p.json"),
        "device": (["--device", "cuda:1"], "cuda:1"),
        "dtype": (["--dtype", "fp16"], "fp16"),
        "compile": (["--no-compile"], False),
        "backend": (["--backend", "fused"], "fused"),
        "quant": (["--quant", "int4"], "int4"),
        "quant_lm_head": (["--quant", "int8", "--lm-head", "int4"], "int4"),
        "kv_cache": (["--kv-cache", "int8"], "int8"),
        "threads": (["--threads", "3"], 3),
        "dequantize": (["--dequantize"], True),
        "force_plan": (["--force-plan"], True),
        "tensor_parallel": (["--tensor-parallel", "2"], 2),
    }
    assert list(given) == [field.name for field in fields(ModelOptions)]
    for name, (arguments, value) in given.items():
        assert getattr(options.model_options(parser.parse_args(arguments)), name) == value
    drafts = "--speculate 3 --draft-sparsity 0.3 --draft-plan p --draft-quant int8"
    drafting = DraftOptions(length=3, sparsity=0.3, plan="p", quant="int8")
    assert options.draft_options(parser.parse_args(drafts.split())) == drafting


def test_sampling_options_set_every_field(parser: argparse.ArgumentParser) -> None:
    arguments = "--temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --seed 7 "
    arguments += "--presence-penalty -0.5 --frequency-penalty 1.5 --logit-bias 42:-100 --logit-bias 7:0.5"
    expected = SamplingParams(0.5, 3, 0.9, 0.1, 1.1, 7, -0.5, 1.5, {42: -100.0, 7: 0.5})
    assert options.sampling_params(parser.parse_args(arguments.split())) == expected
    assert all(getattr(expected, f.name) != getattr(SamplingParams(), f.name) for f in fields(SamplingParams))


@pytest.mark.parametrize(
    "given,words",
    [
        ({"checkpoint": "x", "random_weights": "Llama-3-8B"}, "checkpoint does not go with random_weights"),
        ({"adapter": "x", "random_weights": "Llama-3-8B"}, "adapter does not go with random_weights"),
        ({"random_weights": "GPT-5"}, "random_weights GPT-5: unknown; expected one of "),
        ({"sparsity": 1.5}, r"sparsity 1\.5 is out of range; expected 0 <= sparsity < 1"),
        ({"sparsity": float("nan")}, "sparsity nan is out of range"),
        ({"sparsity": 0.5, "plan": "p.json"}, "plan does not go with sparsity"),
        ({"device": "tpu"}, "device tpu: unknown device; expected cpu, cuda or cuda:N"),
        ({"dtype": "int3"}, "dtype int3: unknown; expected one of auto, bf16, fp16, fp32"),
        ({"backend": "fast"}, "backend fast: unknown; expected one of auto, eager, compiled, fused, program"),
        ({"quant": "int2"}, "quant int2: unknown; expected one of int8, int4"),
        ({"quant_lm_head": "int8"}, "quant_lm_head goes with quant;"),
        ({"quant": "int8", "quant_lm_head": True}, "quant_lm_head True: unknown; expected one of int8, int4"),
        ({"kv_cache": "int4"}, "kv_cache int4: unknown; expected one of float, int8"),
    ],
    ids=str,
)
def test_model_options_are_checked_when_made(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ModelOptions(**given)


@pytest.mark.parametrize(
    "given,words",
    [
        ({"length": 0}, "draft_length 0 is out of range; expected 1 to 16"),
        ({"sparsity": 1.0}, "draft_sparsity 1 is out of range; expected 0 < sparsity < 1"),
        ({"quant": "int2"}, "draft_quant int2: unknown"),
        ({"lookup": True, "quant": "int4"}, "draft_quant does not go with draft_lookup"),
    ],
    ids=str,
)
def test_draft_options_are_checked_when_made(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DraftOptions(**given)
    DraftOptions(sparsity=0.0, plan="p.json"), DraftOptions(sparsity=0.0, lookup=True)  # sparsity says nothing there


def test_the_library_names_parameters_and_a_command_line_its_options() -> None:
    inner = ParameterError("{quant_lm_head} {} goes with {quant}", "{dtype}")
    error = ParameterError("plan {}: {}; use {dtype} {!r:.3}", Path("{a}"), inner, "bf16")
    assert str(error) == "plan {a}: quant_lm_head {dtype} goes with quant; use dtype 'bf"
    assert cli.message_of(error) == "plan {a}: --lm-head {dtype} goes with --quant; use --dtype 'bf"
    assert cli.message_of(UserError("a {dtype} of its own")) == "a {dtype} of its own"


def test_library_errors_name_no_options() -> None:
    """What is raised outside of teal/cli, the commands and the benches has no option's dashes in it."""
    commands = {"generate.py", "calibrate.py", "quantize.py", "serve.py", "evaluate.py"}
    found = []
    for path in (path for room in ("teal", "kernels") for path in (ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if "cli" in parts or "bench" in parts or path.name in commands:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("UserError", "ParameterError", "require"):
                words = [w.strip("'\"") for w in ast.unparse(node).replace("(", " ").split()]
                found += [f"{path.name}: {w}" for w in words if w.startswith("--") and "calibrate.py" not in words]
    assert [word for word in found if "--tasks" not in word] == []  # lm_eval's own


def test_names_are_those_of_what_they_stand_for() -> None:
    from teal.hardware import DTYPES
    from teal.layers.quantized_linear import BITS

    assert ("auto", *DTYPES) == DTYPE_NAMES
    assert tuple(mode for mode in BITS if mode != "mixed") == QUANTS  # mixed needs a text, and so quantize.py


def test_no_command_imports_another() -> None:
    for path in (ROOT / "teal" / "cli").glob("*.py"):
        if path.name == "commands.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert not names & {f"teal.cli.{command}" for command in COMMANDS}, (path.name, names)


def test_options_import_nothing_heavy() -> None:
    script = (
        "import sys; import teal.cli.options; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_a_token_that_the_model_lacks_is_refused(tiny_folder: Path, invoke: Invoke) -> None:
    check_bias(SamplingParams(logit_bias={299: 1.0}), 300)
    given = ("--checkpoint", tiny_folder, "--device", "cpu", "--prompt", "a")
    for value, words in (("300:1", "--logit-bias 300: no such token; this model has 300"), ("5:101", "--logit-bias 5")):
        code, out, err = invoke(*given, "--logit-bias", value)
        assert out == ""
        assert_one_line_error(code, err, words)
    for value in ("5", "x:1", ":1", "5:much"):
        code, _, err = invoke(*given, "--logit-bias", value)
        assert_one_line_error(code, err, "--logit-bias", "TOKEN_ID:BIAS")


def test_a_bias_for_something_else_than_a_token_id_is_refused() -> None:
    with pytest.raises(UserError, match="logit_bias Paris: 1 is out of range; expected token ids"):
        SamplingParams(logit_bias={"Paris": 1, 5: 1})  # type: ignore[dict-item]
