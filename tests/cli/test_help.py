"""--help tells the truth: every option is in a group, explained, and shows the default it has, once."""

import argparse
import importlib
import re
import subprocess
import sys
from typing import Any

import pytest

from teal import __version__
from teal.architectures import ARCHITECTURES
from teal.checkpoint.presets import PRESETS
from tests.conftest import ROOT

COMMANDS = tuple(f"teal.cli.{name}" for name in ("generate", "serve", "calibrate", "quantize", "evaluate"))
BENCHMARKS = tuple(
    f"teal.bench.{path.stem}" for path in (ROOT / "bench").glob("*.py") if "def build_parser" in path.read_text("utf-8")
)


@pytest.fixture(params=[*COMMANDS, *sorted(BENCHMARKS)])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    monkeypatch.setenv("COLUMNS", "10000")  # or a long default would be broken into lines
    return importlib.import_module(request.param).build_parser()


def entries(parser: argparse.ArgumentParser) -> dict[argparse.Action, str]:
    """What --help says of each action, on one line."""
    found = {}
    for group in parser._action_groups:
        for action in group._group_actions:
            formatter = parser._get_formatter()
            formatter.add_argument(action)
            found[action] = " ".join(formatter.format_help().split())
    return found


def typed(action: argparse.Action, text: str) -> Any:
    return text if action.type is None else action.type(text)  # type: ignore[operator]


def test_every_option_is_in_a_named_group(parser: argparse.ArgumentParser) -> None:
    unnamed = {parser._optionals, parser._positionals}
    assert [a.dest for group in unnamed for a in group._group_actions] == []
    assert all(group.title for group in parser._action_groups)


def test_every_option_is_explained_with_its_default_once(parser: argparse.ArgumentParser) -> None:
    for action, entry in entries(parser).items():
        assert action.help and action.help != argparse.SUPPRESS, action.dest
        shown = re.findall(r"\(default: (.*?)\)", entry)
        assert "None" not in entry and "default" not in entry.replace("(default: ", "", 1), entry
        is_off = action.nargs == 0 or action.default in (None, argparse.SUPPRESS, [], ())
        assert len(shown) == (not is_off), entry
        if shown:
            assert typed(action, shown[0]) == action.default, entry


def test_version_and_help_are_there(parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.split()[-1] == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_known_architectures_are_listed_without_torch() -> None:
    script = "import sys; from teal.cli import generate; print(generate.build_parser().format_help())"
    script += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    shown = "".join(done.stdout.split())
    assert all(name in shown for name in ARCHITECTURES)
    assert set(ARCHITECTURES) == set(PRESETS)
