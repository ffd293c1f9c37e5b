"""pip install . gives console commands that are the scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

COMMANDS = ("generate", "serve", "calibrate", "quantize", "evaluate")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which this checkout has been installed, without what it needs."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # the build writes beside its sources
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder / "site"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def run(installed: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(installed / "bin" / f"teal-{command}"), *arguments], capture_output=True, text=True,
        cwd=installed, env=os.environ | {"PYTHONPATH": str(installed)}, timeout=180,
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_help(installed: Path, command: str) -> None:
    done = run(installed, command, "--help")
    assert done.returncode == 0 and f"teal-{command}" in done.stdout, done.stderr


def test_an_installed_command_generates(installed: Path, tiny_folder: Path) -> None:
    options = (
        "--checkpoint",
        str(tiny_folder),
        "--prompt",
        "The",
        "--max-new-tokens",
        "4",
        "--sparsity",
        "0.5",
        "--json",
    )
    done = run(installed, "generate", *options)
    assert done.returncode == 0 and '"new_tokens": ' in done.stdout, done.stderr
    assert (installed / "teal_app" / "web" / "index.html").is_file()


def test_a_mistake_is_one_line(installed: Path) -> None:
    done = run(installed, "quantize", "--mode", "int5", "-o", "x")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_options(installed: Path, shell: str) -> None:
    done = run(installed, "serve", "--print-completion", shell)
    assert done.returncode == 0 and "--sparsity" in done.stdout and "teal-serve" in done.stdout, done.stderr
