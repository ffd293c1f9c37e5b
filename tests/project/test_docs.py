"""docs/ tells the truth: its commands run, its excerpts are the code, its links lead somewhere."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_line

DOCS = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
BLOCKS = [
    (path.name, kind, textwrap.dedent(body))
    for path in DOCS
    for _, kind, body in FENCE.findall(path.read_text(encoding="utf-8"))
]
COMMANDS = [(name, line) for name, kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
PYTHON = [(name, body) for name, kind, body in BLOCKS if kind == "python"]
EXCERPTS = [(name, body) for name, body in PYTHON if body.startswith("# ")]
PROGRAMS = [(name, body) for name, body in PYTHON if not body.startswith("# ")]


@pytest.mark.parametrize("name,line", COMMANDS, ids=[f"{n}: {c[:60]}" for n, c in COMMANDS])
@pytest.mark.usefixtures("default_folder")
def test_commands_run(name: str, line: str) -> None:
    done = run_line(line, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (done.stdout + done.stderr).strip()


@pytest.mark.parametrize("name,body", EXCERPTS, ids=[f"{n} {i}" for i, (n, _) in enumerate(EXCERPTS)])
def test_excerpts_are_the_code(name: str, body: str) -> None:
    first, rest = body.split("\n", 1)
    source = (ROOT / first.removeprefix("# ")).read_text(encoding="utf-8")
    indents = [textwrap.indent(rest, " " * n) for n in range(0, 13, 4)]
    assert any(indented in source for indented in indents), f"{name}: not in {first.removeprefix('# ')}:\n{rest}"


@pytest.mark.parametrize("name,body", PROGRAMS, ids=[n for n, _ in PROGRAMS])
def test_programs_run(name: str, body: str) -> None:
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ splits, \d+ of 64 rows read, error \de-0[5-9]\n", done.stdout), done.stdout


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in DOCS} - {"README.md"}
