"""The README and the pages of docs/: their blocks of code, and their commands run as a reader types them."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.conftest import ROOT
from tests.forked import run_forked

FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
FOLDER = "/tmp/"  # where examples write; tests put a folder of their own in its place


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind ("sh", "python") on a page."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(body) for _, language, body in found if language == kind]


def stories(lines: list[str]) -> list[list[str]]:
    """Commands, in order, grouped so that those which name the same file under /tmp/ stay together."""
    found: list[tuple[set[str], list[int]]] = []  # files and numbers of lines
    for number, line in enumerate(lines):
        files, numbers = set(re.findall(rf"{FOLDER}([\w-]+)", line)), [number]
        for story in [story for story in found if story[0] & files]:
            found.remove(story)
            files, numbers = files | story[0], story[1] + numbers
        found.append((files, sorted(numbers)))
    return [[lines[number] for number in numbers] for numbers in sorted(numbers for _, numbers in found)]


def commands(page: Path) -> list[list[str]]:
    """The commands on a page, as stories. Those that make an environment are left to a fresh machine."""
    return stories([line for body in blocks(page, "sh") for line in body.splitlines() if "venv" not in line])


def run_example(line: str, folder: Path, cache: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command in the repository root by this Python, with folder in the place of /tmp.

    It must succeed and say something. cache: another folder for the user's cache, and so for the default model.
    """
    command = line.replace(FOLDER, f"{shlex.quote(str(folder))}/")  # before the interpreter, which may lie there
    environment = os.environ | ({} if cache is None else {"XDG_CACHE_HOME": str(cache)})
    name, *arguments = shlex.split(command, comments=True)
    if name == "python" and not re.search(r"[|&;<>$*?]", line):  # no need of a shell
        done = run_forked(ROOT, tuple(arguments), b"", 600, environment)
    else:
        command = command.replace("python ", f"{shlex.quote(sys.executable)} ")
        done = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT, timeout=600, env=environment)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, f"{line}\n{out[-2000:]}{err[-2000:]}"
    assert (out + err).strip(), line
    return subprocess.CompletedProcess(line, done.returncode, out, err)


def run_readme_program(cwd: Path, python: str | Path = sys.executable) -> list[str]:
    """The lines that the README's example in Python prints, run in a folder by a Python."""
    [example] = [body for body in blocks(ROOT / "README.md", "python") if "Engine" in body]
    done = subprocess.run([str(python), "-c", example], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()
