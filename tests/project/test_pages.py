"""README, docs/ and the pages of figures: links and files are there, sentences and the README are short."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.project.prose import LONGEST

README = ROOT / "README.md"
PROSE = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*PROSE, ROOT / "BENCHMARKS.md", ROOT / "RESULTS.md"]
FENCE = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
NO_PROSE = re.compile(r"<!--.*?-->|^[|#].*?$|^!\[.*?$", re.DOTALL | re.MULTILINE)  # comments to pictures


def anchors(page: Path) -> set[str]:
    """The names by which headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def sentences(markdown: str) -> list[str]:
    """The sentences of a page's prose; code in a line is one word, and an item of a list ends a sentence."""
    prose = NO_PROSE.sub("\n", FENCE.sub("\n", markdown))
    prose = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", prose))
    items = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", prose)
    return [s for item in items for s in re.split(r"(?<=[.!?])[)*]* ", " ".join(item.split()))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        to = page.parent / target if target else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_exist(page: Path) -> None:
    """A path in backticks is one of the repository; a bare name is that of a file in some folder of it."""
    names = {path.name for path in ROOT.rglob("*.*") if ".venv" not in path.parts}
    for name in re.findall(r"`([\w./-]+\.(?:py|cpp|cu|toml|txt))`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or ("/" not in name and name in names), name


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    found = sentences(page.read_text(encoding="utf-8"))
    assert [s for s in found if len(re.findall(r"\S*\w\S*", s)) > LONGEST] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) < 200
