"""The README tells the truth: its examples run, and so are the tables of options, on whatever page, complete."""

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from teal.bench import decode, gemv, load, report, serving, soak, speculate, tune
from teal.cli import calibrate, evaluate, generate, quantize, serve
from tests.conftest import ROOT
from tests.project.pages import PAGES, blocks, commands, run_example, run_readme_program

README = ROOT / "README.md"
BENCHES: tuple[Any, ...] = (decode, gemv, load, report, serving, soak, speculate, tune)
STORIES = commands(README)
PARSERS = {
    module.__name__.split(".")[-1]: module.build_parser for module in (calibrate, evaluate, generate, quantize, serve)
}


@pytest.mark.parametrize("story", STORIES, ids=[story[0] for story in STORIES])
def test_examples_run(story: list[str], tmp_path: Path, shallow_cache: Path) -> None:
    """With few layers of the default model; the example in Python below has all of them."""
    for line in story:
        done = run_example(line, tmp_path, shallow_cache)
        if "quantize.py --mode" in line:  # its result is a folder
            assert " MB" in done.stderr
        else:
            assert done.stdout.strip(), line
        if "--json" in line:
            assert json.loads(done.stdout)["text"]
        if "bench.report" in line:
            check_report(tmp_path)
        if "bench.decode" in line:
            result = json.loads(done.stdout.splitlines()[-1])
            assert [row["label"] for row in result["rows"]] == ["dense", "50% sparse"]
            assert all(row["tokens_per_s"] > 0 and row["gb_per_s"] > 0 for row in result["rows"])


def check_report(folder: Path) -> None:
    """The report has all rows, two plots, and asks no other host."""
    report = json.loads((folder / "report.json").read_text())
    assert [row["sparsity"] > 0.4 for row in report["decode"]] == [False, True] and len(report["gemv"]) == 8
    page = (folder / "report.html").read_text()
    names = r'(xmlns|rdf)[^"]*"[^"]*"|<metadata>.*?</metadata>'
    assert page.count("<svg") == 2 and "http" not in re.sub(names, "", page, flags=re.DOTALL)


@pytest.mark.usefixtures("default_folder")
def test_python_example_runs() -> None:
    *text, speed, batch = run_readme_program(ROOT)
    assert float(speed) > 1 and len("".join(text)) > 10 and len(ast.literal_eval(batch)) == 2


def test_there_are_two_set_up_commands_of_one_line() -> None:
    lines = [line for block in blocks(README, "sh") for line in block.splitlines() if "venv" in line]
    assert len(lines) == 2
    assert "generate.py" in lines[0] and lines[1].endswith("pytest")


def options_of(command: str) -> set[str]:
    """All options of a command but --help."""
    actions = PARSERS[command]()._actions
    return {o for action in actions for o in action.option_strings if o.startswith("--")} - {"--help"}


def option_tables() -> dict[str, set[str]]:
    """What the first column of each table "option of `<command>.py`" names, by command, wherever the table is."""
    found = {}
    for page in PAGES:
        _, *tables = re.split(r"^\| option of `(\w+)\.py` \|", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for command, rest in zip(tables[::2], tables[1::2], strict=True):
            rows = rest.split("\n\n", 1)[0].splitlines()
            found[command] = {o for row in rows for o in re.findall(r"`(--[a-z0-9-]+)", row.split(" | ")[0])}
    return found


TABLES = option_tables()


def test_generate_has_a_table_of_options() -> None:
    assert "generate" in TABLES


@pytest.mark.parametrize("command", TABLES)
def test_option_tables_are_complete_and_true(command: str) -> None:
    assert TABLES[command] == options_of(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_on_a_page_exist(page: Path) -> None:
    benches = [action for module in BENCHES for action in module.build_parser()._actions]
    known = {option for action in benches for option in action.option_strings}.union(*map(options_of, PARSERS))
    known |= {"--help", "--full"}  # the latter is pytest's here (tests/conftest.py)
    known |= {"--quantization", "--hf-overrides"}  # vLLM's
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", page.read_text(encoding="utf-8"))) <= known


def test_options_have_help() -> None:
    parsers = [module.build_parser() for module in BENCHES] + [build() for build in PARSERS.values()]
    assert all(action.help for parser in parsers for action in parser._actions)


def test_torch_is_pinned_exactly() -> None:
    assert "torch==2.13.0\n" in (ROOT / "requirements.txt").read_text()


def test_no_artefacts_are_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".pyc", ".so", ".safetensors", ".gguf", ".png"}
    artefacts = [f for f in tracked.stdout.split() if Path(f).suffix in suffixes and not f.startswith("docs/images/")]
    assert artefacts == []
