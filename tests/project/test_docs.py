"""docs/ tells the truth: its commands run, its excerpts are the code, its links and files are there."""

import json
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
PROGRAMS = [(name, body) for name, body in PYTHON if not body.startswith("# ") and "http://" not in body]
PAGES = [ROOT / "README.md", *DOCS]  # of prose for readers
MEASURED = [ROOT / "BENCHMARKS.md", ROOT / "RESULTS.md"]
LONGEST = 24  # words of a sentence


@pytest.mark.parametrize("name,line", COMMANDS, ids=[f"{n}: {c[:60]}" for n, c in COMMANDS])
@pytest.mark.usefixtures("default_folder")
def test_commands_run(name: str, line: str) -> None:
    done = run_line(line, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (done.stdout + done.stderr).strip()
    if "bench.decode" in line:
        result = json.loads(done.stdout.splitlines()[-1])
        assert [row["label"] for row in result["rows"]] == ["dense", "50% sparse"]
        assert all(row["tokens_per_s"] > 0 and row["gb_per_s"] > 0 for row in result["rows"])


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


def anchors(path: Path) -> set[str]:
    """The names by which headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, *MEASURED], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8")):
        to = path.parent / target if target else path
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), f"{target}#{anchor}"


@pytest.mark.parametrize("path", [*PAGES, *MEASURED], ids=lambda p: p.name)
def test_files_named_exist(path: Path) -> None:
    """A path in backticks is one of the repository; a bare name is that of a file in some folder of it."""
    names = {found.name for found in ROOT.rglob("*.*") if ".venv" not in found.parts}
    for name in re.findall(r"`([\w./-]+\.(?:py|cpp|cu|toml|txt))`", path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or ("/" not in name and name in names), name


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's prose: neither code, tables, headings nor comments; an item of a list ends one."""
    prose = re.sub(r"^ *```.*?^ *```$|<!--.*?-->|^[|#].*?$|^!\[.*?$", "\n", markdown, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", prose))
    items = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", prose)
    return [s for item in items for s in re.split(r"(?<=[.!?])[)*]* ", " ".join(item.split()))]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_sentences_are_short(path: Path) -> None:
    found = sentences(path.read_text(encoding="utf-8"))
    assert [s for s in found if len(re.findall(r"\S*\w\S*", s)) > LONGEST] == []


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in DOCS} - {"README.md"}
