"""Rooms and the map: imports point down only, nothing unsafe or heavy creeps in, and files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.project import architecture
from tests.project.architecture import FLOOR, MARKS, PAGE, Module, arrows, height, modules, room_arrows, room_of
from tests.project.prose import SOURCES

MODULES = list(modules().values())
MOST_LINES = 400
MOST_LINES_OF = {"main": 40}  # of a function; all others:
MOST_LINES_OF_A_FUNCTION = 50
CODE = [path for path in SOURCES if path.suffix == ".py"]
by_path = pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
by_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.path))


def test_every_file_is_on_the_map() -> None:
    """By the name it has in an installed copy, but for examples and for scripts that only call teal.cli."""
    tests = {path for path in CODE if path.is_relative_to(ROOT / "tests")}
    pages = {path for path in CODE if path.name == "__init__.py"}
    assert {ROOT / module.path for module in MODULES} == set(CODE) - tests - pages
    assert {room_of(module.name) for module in MODULES} == set(FLOOR)


@by_module
def test_imports_point_down(module: Module) -> None:
    room = room_of(module.name)
    for other in module.imports:
        below = room_of(other)
        assert below == room or FLOOR[below] < FLOOR[room], f"{room} imports {other} of {below}"


@by_module
def test_imports_have_one_name(module: Module) -> None:
    """As `from teal.…`: a top-level name would be another module, which is not there in an installed copy."""
    tree = ast.parse((ROOT / module.path).read_text(encoding="utf-8"))
    top = {path.name.removesuffix(".py") for path in ROOT.iterdir()} - {"teal"}
    assert not {name.split(".")[0] for name in architecture.imported_names(tree)} & top
    assert all(not node.level for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)), "a relative import"


def test_no_cycles() -> None:
    assert height({name: set(module.imports) for name, module in modules().items()}) > 0
    assert height(arrows()) > 0 and height(room_arrows()) <= len(architecture.FLOORS)


def test_cycles_and_back_arrows_would_be_seen(tmp_path: Path) -> None:
    """The checks can fail: a small checkout of two modules that import each other, one of them within a function."""
    (tmp_path / "teal" / "checkpoint").mkdir(parents=True)
    (tmp_path / "teal" / "plan.py").write_text("def f():\n    from teal.checkpoint import weights\n")
    (tmp_path / "teal" / "checkpoint" / "weights.py").write_text("import teal.plan\n")
    found = modules(tmp_path)
    assert found["teal.plan"].imports == {"teal.checkpoint.weights"}
    assert FLOOR[room_of("teal.plan")] < FLOOR[room_of("teal.checkpoint.weights")]
    with pytest.raises(ValueError, match="a cycle among"):
        height(arrows(tmp_path))


def test_the_map_is_up_to_date() -> None:
    """If not: python -m tests.project.architecture."""
    text = PAGE.read_text(encoding="utf-8")
    assert [text.count(mark) for mark in MARKS] == [1, 1]
    assert architecture.with_map(text) == text, "stale; run python -m tests.project.architecture"


@pytest.mark.parametrize("page", sorted((ROOT / "teal").glob("*/__init__.py")), ids=lambda page: page.parent.name)
def test_rooms_say_what_they_are_for(page: Path) -> None:
    """In two lines; and their pages import nothing, so that one module of a room costs no other."""
    tree = ast.parse(page.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    inside = {name for name in architecture.imported_names(tree) if name.startswith("teal.")}
    assert inside <= {"teal.interrupts"}


def test_model_knows_nothing_of_what_replaces_its_modules() -> None:
    text = (ROOT / "model.py").read_text(encoding="utf-8")
    assert modules()["teal.model"].imports == {"teal.projection", "teal.rope"}
    assert not modules()["teal.projection"].imports | modules()["teal.rope"].imports
    for word in ("SparseLinear", "threshold", "quantize", "compile("):
        assert word not in text


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(name, lines) of all functions, decorators left out."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


@by_path
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for name, lines in functions(ast.parse(text)):
        assert lines <= MOST_LINES_OF.get(name, MOST_LINES_OF_A_FUNCTION), f"{name} has {lines} lines"


@by_path
def test_files_are_safe(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree) or not text.strip(), "no module docstring"
    if path.is_relative_to(ROOT / "tests"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "path"), "path tricks"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in ast.unparse(node), "a pickle can run code"
    assert "import pickle" not in text


def test_help_does_not_import_torch() -> None:
    """--help and a mistyped option answer at once: torch alone takes a second or more to import."""
    script = "import sys; from teal.cli import generate; generate.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
