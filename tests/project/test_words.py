"""What is said to a reader of the code: short sentences, names of files that exist, failures that name a tensor."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.project.prose import SOURCES, comments_of_cpp, long_sentences, prose_in

PATHS = [f"/{path.relative_to(ROOT).as_posix()}" for path in SOURCES]
NAMED = re.compile(r"[\w./-]*\w\.(?:py|cpp|h|cuh?)\b")
NOT_OURS = {"llama.cpp", "config.cuh"}  # a project; what plan.py generates
by_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def missing_files(prose: str) -> list[str]:
    """The names of sources in a text, addresses aside, that no path of the tree ends with."""
    named = (name.removeprefix("./") for name in NAMED.findall(prose))
    ours = [name for name in named if name not in NOT_OURS and not name.startswith("//")]
    return [name for name in ours if not any(path.endswith(f"/{name}") for path in PATHS)]


def silent_comparisons(tree: ast.Module) -> Iterator[int]:
    """Lines of asserts that compare by relative_error and would fail without saying which tensor."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node.msg is None:
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            if "relative_error" in names:
                yield node.lineno


@by_source
def test_sentences_are_short(path: Path) -> None:
    """python -m tests.project.prose lists all that are too long."""
    assert long_sentences(path) == []


@by_source
def test_lines_are_short(path: Path) -> None:
    """As ruff holds those of Python: of C++ and CUDA nothing else does."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert path.suffix == ".py" or [i for i, line in enumerate(lines, start=1) if len(line) > 120] == []


@by_source
def test_named_files_exist(path: Path) -> None:
    """In comments and docstrings: a renamed file is renamed there, too."""
    assert [(line, name) for line, prose in prose_in(path) for name in missing_files(prose)] == []


@by_source
def test_comparisons_say_of_what(path: Path) -> None:
    """By a message, or with assert_near of tests/conftest.py, which takes a name."""
    if path.suffix == ".py":
        assert list(silent_comparisons(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_checks_can_fail(tmp_path: Path) -> None:
    assert missing_files("see kernels/packing.py, model.py, teal/no_such.py and llama.cpp") == [
        "kernels/packing.py",
        "teal/no_such.py",
    ]
    tree = ast.parse("assert relative_error(a, b) < 1\nassert relative_error(a, b) < 1, 'a'\nassert a")
    assert list(silent_comparisons(tree)) == [1]
    (tmp_path / "a.py").write_text("# " + 25 * "word " + ".\n")
    assert len(long_sentences(tmp_path / "a.py")) == 1


def test_comments_of_cpp() -> None:
    source = "// Two lines\n// of one comment.\nint a;  // beside code\n\n// Another."
    assert list(comments_of_cpp(source)) == [(1, "Two lines\nof one comment."), (3, "beside code"), (5, "Another.")]
