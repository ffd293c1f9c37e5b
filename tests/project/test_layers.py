"""The module map: imports point downwards only, and nothing unsafe or heavy creeps in."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {
        "environment",
        "errors",
        "architectures",
        "interrupts",
        "progress",
        "user_text",
        "files",
        "params",
        "model",
        "plan",
        "shutdown",
        "exclusive",
        "figures",
    },
    {"cli", "kernels"},
    {
        "awq_gptq",
        "quantization",
        "teal_layers",
        "int8_cache",
        "fused_block",
        "hardware",
        "compilation",
        "sampling",
        "plan_switch",
        "output_head",
    },
    {
        "hf_config",
        "checkpoint",
        "gguf_convert",
        "gguf_header",
        "gguf_parts",
        "source",
        "presets",
        "token_backends",
        "text_length",
        "control_tokens",
        "chat_template",
        "tokenizer",
        "streaming",
        "loading",
    },
    {"texts", "greedy", "calibration", "evaluation", "gptq", "half_quadratic", "harness", "teal_import", "plots"},
    {"engine"},
    {"speculation"},
    {
        "generation",
        "decode_rows",
        "row_table",
        "prefill",
        "scheduler",
        "conversation",
        "constrained",
        "request_errors",
        "openai_schema",
        "tool_calls",
        "openai_api",
        "http_errors",
        "http_limits",
        "http_origin",
        "http_protocol",
        "endpoints",
        "server",
    },
    {"generate", "serve", "calibrate", "evaluate", "quantize", "bench", "commands", "examples"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if "tests" not in p.parts and not any(s.startswith(".") for s in p.parts))


def imports_of(path: Path) -> set[str]:
    """Top-level names of this project's modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found & set(LEVEL)


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_module_has_a_level() -> None:
    assert {module_of(p) for p in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    own = module_of(path)
    for name in imports_of(path) - {own}:
        same_level_is_fine = LEVEL[own] in (0, 2, 3, 4, 7, 8)  # these use each other, in the order the next test checks
        assert LEVEL[name] < LEVEL[own] or (same_level_is_fine and LEVEL[name] == LEVEL[own]), f"{own} imports {name}"


def test_no_cycles() -> None:
    graph = {name: set().union(*(imports_of(p) for p in FILES if module_of(p) == name)) - {name} for name in LEVEL}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


def test_model_knows_nothing_of_what_replaces_its_modules() -> None:
    text = (ROOT / "model.py").read_text(encoding="utf-8")
    assert imports_of(ROOT / "model.py") == set()
    for word in ("SparseLinear", "threshold", "quantize", "compile("):
        assert word not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_size_and_safety(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            limit = 40 if node.name == "main" else 60
            assert (node.end_lineno or 0) - node.lineno < limit, f"{node.name} is too long"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and path.name != "commands.py":
            assert (node.value.id, node.attr) != ("sys", "path"), "path tricks"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node), "a pickle can run code"
    assert "import pickle" not in text


def test_help_does_not_import_torch() -> None:
    """--help and a mistyped option answer at once: torch alone takes a second or more to import."""
    import subprocess

    script = "import sys; from teal.cli import generate; generate.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
