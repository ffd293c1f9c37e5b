"""The README tells the truth: its examples run, its option table is complete."""

import argparse
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from teal.bench.decode import build_parser
from teal.cli import calibrate, evaluate, generate
from tests.conftest import ROOT, run_line

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
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
    if "bench.decode" in line:
        result = json.loads(done.stdout.splitlines()[-1])
        assert [row["label"] for row in result["rows"]] == ["dense", "50% sparse"]
        assert all(row["tokens_per_s"] > 0 and row["gb_per_s"] > 0 for row in result["rows"])


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


def documented_options(header: str) -> set[str]:
    """Options named in the first column of the table with this header."""
    rows = README.split(header, 1)[1].split("\n\n", 1)[0]
    return {o for row in rows.splitlines() for o in re.findall(r"`(--[a-z-]+)", row.split(" | ")[0])}


def test_option_table_is_complete_and_true() -> None:
    assert documented_options("| option of `generate.py` |") == options_of(generate.build_parser())


def test_what_is_said_of_calibrate_and_evaluate_exists() -> None:
    assert documented_options("| `calibrate.py` |") <= options_of(calibrate.build_parser())
    section = re.split(r"\n#+ ", README.split("### Calibrate and evaluate", 1)[1])[0]
    known = options_of(calibrate.build_parser()) | options_of(evaluate.build_parser()) | {"--help"}
    assert set(re.findall(r"(--[a-z][a-z-]+)", section)) <= known


def test_bench_options_have_help() -> None:
    assert all(action.help for action in build_parser()._actions)


def test_files_the_readme_links_to_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_torch_is_pinned_exactly() -> None:
    assert "torch==2.13.0\n" in (ROOT / "requirements.txt").read_text()


def test_no_artefacts_are_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".pyc", ".so", ".safetensors", ".gguf", ".png"}
    artefacts = [f for f in tracked.stdout.split() if Path(f).suffix in suffixes and not f.startswith("docs/images/")]
    assert artefacts == []
