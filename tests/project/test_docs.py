"""docs/ tells the truth: its commands run, its excerpts are the code, every page is listed."""

import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

from teal.checkpoint.config import load_config
from teal.plan import ProjectionPlan, even_plan
from tests.conftest import ROOT, run_command
from tests.project.pages import DOCS, FOLDER, blocks, commands, run_example, stories

ALL = [(page.name, story) for page in DOCS for story in commands(page)]
STORIES = [(name, story) for name, story in ALL if "pytest" not in story[0]]
TESTS = [(name, line) for name, story in ALL for line in story if "pytest" in line]
PYTHON = [(page.name, body) for page in DOCS for body in blocks(page, "python")]
EXCERPTS = [(name, body) for name, body in PYTHON if body.startswith("# ")]
PROGRAMS = [(name, body) for name, body in PYTHON if not body.startswith("# ")]
PRINTED = {  # by the program of a page
    "kernel.md": r"\d+ splits, \d+ of 64 rows read, error \de-0[5-9]\n",
    "calibrate-and-evaluate.md": r"Once upon a .*\{'q': 0\.\d+, .* 'down': 0\.\d+\}\n",
}


@pytest.mark.parametrize("name,story", STORIES, ids=[f"{name}: {story[0][:60]}" for name, story in STORIES])
def test_commands_run(name: str, story: list[str], tmp_path: Path, shallow_cache: Path) -> None:
    for line in story:
        run_example(line, tmp_path, shallow_cache)


class Collected:
    """A plugin of pytest that keeps how many tests a command would run."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.count = len(session.items)


@pytest.mark.parametrize("name,line", TESTS, ids=[f"{name}: {line}" for name, line in TESTS])
def test_tests_named_exist(name: str, line: str) -> None:
    """They run as all others do; here they are only found, by the command's own words."""
    program, module, runner, *arguments = shlex.split(line)
    assert (program, module, runner) == ("python", "-m", "pytest")
    found = Collected()
    options = ("-n", "0", "--collect-only", "-p", "no:cacheprovider")
    assert pytest.main([*arguments, *options], plugins=[found]) == 0 and found.count > 0


def test_commands_that_share_a_file_stay_together() -> None:
    lines = ["a -o /tmp/x", "b", "c /tmp/x/y -o /tmp/z", "d /tmp/z.json /tmp/z", "e -o /tmp/w"]
    assert stories(lines) == [[lines[0], *lines[2:4]], ["b"], ["e -o /tmp/w"]]
    both = "f /tmp/z /tmp/w"
    assert stories([*lines, both]) == [[lines[0], *lines[2:], both], ["b"]]


@pytest.mark.parametrize("name,body", EXCERPTS, ids=[f"{n} {i}" for i, (n, _) in enumerate(EXCERPTS)])
def test_excerpts_are_the_code(name: str, body: str) -> None:
    first, rest = body.split("\n", 1)
    source = (ROOT / first.removeprefix("# ")).read_text(encoding="utf-8")
    indents = [textwrap.indent(rest, " " * n) for n in range(0, 13, 4)]
    assert any(indented in source for indented in indents), f"{name}: not in {first.removeprefix('# ')}:\n{rest}"


@pytest.mark.parametrize("name,body", PROGRAMS, ids=[n for n, _ in PROGRAMS])
def test_programs_run(name: str, body: str, tmp_path: Path, default_floats: Path) -> None:
    """With the default model, and a plan for it, where they read one."""
    (tmp_path / "model").symlink_to(default_floats)
    even_plan(load_config(default_floats), ProjectionPlan(0.5, 0.1)).save(tmp_path / "plan.json")
    done = run_command("-c", body.replace(FOLDER, f"{tmp_path}/"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTED[name], done.stdout.decode(), re.DOTALL), done.stdout


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in DOCS} - {"README.md"}


def test_an_interpreter_under_tmp_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a clone there, with an environment of its own."""
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert run_example("python -c 'print(\"/tmp/x\")' | cat", Path("/elsewhere")).stdout == "/elsewhere/x\n"
