"""Long loops tell how far they are: a bar on a terminal, lines in a log."""

import ast
import io
import time
from pathlib import Path

import pytest

from teal import progress as progress_module
from teal.progress import progress
from tests.conftest import ROOT


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_at_every_interval_even_within_one_item(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "INTERVAL_S", 0.2)
    seen = []
    for item in progress([1, 2, 3], "counting", "number"):
        seen.append(item)
        time.sleep(0.5 if item == 2 else 0.01)
    lines = capsys.readouterr().err.splitlines()
    assert seen == [1, 2, 3] and 1 <= len(lines) <= 3
    assert all(line.startswith("counting: 1 of 3 numbers after ") for line in lines)
    time.sleep(0.5)
    assert capsys.readouterr().err == ""  # it ends with the loop


def test_the_lines_end_with_a_loop_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_module, "INTERVAL_S", 0.2)
    for _ in progress([1, 2, 3], "counting", "number"):
        break
    time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_a_quick_loop_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(1000), "counting", "number")) == list(range(1000))
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(progress([1, 2], "counting", "number")) == [1, 2]
    assert "counting" in terminal.getvalue() and "\r" in terminal.getvalue()


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.name)
def test_all_loops_use_it(path: Path) -> None:
    imported = {
        name.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)
        for name in node.names
    }  # fmt: skip
    assert "tqdm" not in imported or path.name == "progress.py"
