"""The README tells the truth: its examples run; the tables of options in docs/ are complete."""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from teal.bench.decode import build_parser
from teal.cli import calibrate, evaluate, generate, quantize, serve
from tests.conftest import ROOT, run_line

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
PAGES = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
EXAMPLES = [line for block in BLOCKS for line in block.splitlines() if "venv" not in line]


@pytest.mark.parametrize("line", EXAMPLES)
@pytest.mark.usefixtures("default_folder")
def test_example_runs(line: str) -> None:
    done = run_line(line, timeout=300)
    assert done.returncode == 0, done.stderr
    if "quantize.py --mode" in line:  # its result is a folder
        assert " MB" in done.stderr
    else:
        assert done.stdout.strip()
    if "--json" in line:
        assert json.loads(done.stdout)["text"]
    if "bench.report" in line:
        report = json.loads(Path("/tmp/report.json").read_text())
        assert [row["sparsity"] > 0.4 for row in report["decode"]] == [False, True] and len(report["gemv"]) == 8
        page = Path("/tmp/report.html").read_text()
        assert page.count("<svg") == 2 and "http" not in re.sub(
            r'(xmlns|rdf)[^"]*"[^"]*"|<metadata>.*?</metadata>', "", page, flags=re.DOTALL
        )


@pytest.mark.usefixtures("default_folder")
def test_python_example_runs() -> None:
    [example] = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "engine" in block]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    *text, speed, batch = done.stdout.splitlines()
    assert float(speed) > 1 and len("".join(text)) > 10 and len(ast.literal_eval(batch)) == 2


def test_there_are_two_set_up_commands_of_one_line() -> None:
    lines = [line for block in BLOCKS for line in block.splitlines() if "venv" in line]
    assert len(lines) == 2
    assert "generate.py" in lines[0] and lines[1].endswith("pytest")


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {o for action in parser._actions for o in action.option_strings if o.startswith("--")} - {"--help"}


def documented_options(command: str) -> set[str]:
    """Options named in the first column of docs' table of a command's options."""
    [page] = [text for text in PAGES if f"| option of `{command}` |" in text]
    rows = page.split(f"| option of `{command}` |", 1)[1].split("\n\n", 1)[0]
    return {o for row in rows.splitlines() for o in re.findall(r"`(--[a-z-]+)", row.split(" | ")[0])}


@pytest.mark.parametrize("command", [generate, calibrate, evaluate, quantize], ids=lambda c: c.__name__)
def test_option_tables_are_complete_and_true(command: ModuleType) -> None:
    name = f"{command.__name__.rpartition('.')[2]}.py"
    assert documented_options(name) == options_of(command.build_parser())


def test_the_servers_table_has_its_own_options() -> None:
    shared = options_of(generate.build_parser())
    assert documented_options("serve.py") == options_of(serve.build_parser()) - shared


def test_bench_options_have_help() -> None:
    assert all(action.help for action in build_parser()._actions)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_torch_is_pinned_exactly() -> None:
    assert "torch==2.13.0\n" in (ROOT / "requirements.txt").read_text()


def test_no_artefacts_are_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".pyc", ".so", ".safetensors", ".gguf", ".png"}
    artefacts = [f for f in tracked.stdout.split() if Path(f).suffix in suffixes and not f.startswith("docs/images/")]
    assert artefacts == []
