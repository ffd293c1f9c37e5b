"""pip install . gives `import teal`, commands and nothing generic: seen from another folder, with decoys."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.project.pages import run_readme_program

COMMANDS = ("generate", "serve", "calibrate", "quantize", "evaluate")
DECOYS = ("model", "errors", "files", "generate", "serve", "calibrate", "quantize", "evaluate", "teal_layers")
DECOY_FOLDERS = ("kernels", "bench", "tests", "examples")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks and would, links as links: building writes beside its sources."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    source = tmp_path_factory.mktemp("source")
    for name in listed.stdout.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    return source


def run(*command: str | Path, cwd: Path, timeout: float = 180) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder, with no PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment
    )


def test_links_that_became_text_files_are_named(source: Path, tmp_path: Path) -> None:
    """As git leaves them where the system has no symbolic links."""
    copy = Path(shutil.copytree(source, tmp_path / "copy", symlinks=True))
    for link in [path for path in copy.rglob("*") if path.is_symlink()]:
        text = os.readlink(link)
        link.unlink()
        link.write_text(text, encoding="utf-8")
    done = run(sys.executable, copy / "generate.py", "--prompt", "a", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "links of this checkout are text files" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds of the checkout, with this environment's setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    done = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder)
    assert done.returncode == 0, done.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; this environment's packages serve as its dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    options = ("--quiet", "--no-deps", "--no-index")
    done = run(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", *options, wheel, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    (site_packages(folder) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder, whose files have the names of this project's own and end whoever imports them."""
    for name in (*(f"{decoy}.py" for decoy in DECOYS), *(f"{decoy}/__init__.py" for decoy in DECOY_FOLDERS)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise SystemExit({name + ' of another program was imported'!r})\n")
    return tmp_path


def site_packages(environment: Path) -> Path:
    [folder] = environment.glob("lib/python*/site-packages")
    return folder


def test_nothing_generic_is_installed(environment: Path) -> None:
    found = {path.name for path in site_packages(environment).iterdir()} - {"dependencies.pth"}
    assert "teal" in found and all(re.fullmatch(r"teal(-[\d.]+\.dist-info)?", name) for name in found), found


def test_the_wheel_holds_all_modules_and_data(wheel: Path) -> None:
    """What a link in teal/ leads to arrives as a file; and so do the page, the C++ sources and the mark of typing."""
    with zipfile.ZipFile(wheel) as archive:
        names = {info.filename for info in archive.infolist()}
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    expected = {"teal/py.typed"}
    for folder, _, files in os.walk(ROOT / "teal", followlinks=True):
        relative = Path(folder).relative_to(ROOT)
        kinds = (".py", ".cpp", ".cu", ".cuh", ".html", ".js", ".css")
        expected |= {str(relative / f) for f in files if f.endswith(kinds)}
    assert {name for name in names if ".dist-info/" not in name} >= expected, expected - names
    for name in expected - {"teal/py.typed"}:
        assert sizes[name] == (ROOT / name).stat().st_size, name


def test_the_source_distribution_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    build = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    done = run(sys.executable, "-c", build, tmp_path, cwd=source)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path)
    done = run(sys.executable, "-m", "pip", "wheel", *options, folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / wheel.name) as again, zipfile.ZipFile(wheel) as first:
        content = [{i.filename: i.CRC for i in a.infolist() if ".dist-info/" not in i.filename} for a in (again, first)]
    assert content[0] == content[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_help(environment: Path, elsewhere: Path, command: str) -> None:
    done = run(environment / "bin" / f"teal-{command}", "--help", cwd=elsewhere)
    assert done.returncode == 0 and f"teal-{command}" in done.stdout, done.stderr


def test_an_installed_command_generates(environment: Path, elsewhere: Path, tiny_folder: Path) -> None:
    options = ("--checkpoint", tiny_folder, "--prompt", "The", "--max-new-tokens", "4", "--sparsity", "0.5", "--json")
    done = run(environment / "bin" / "teal-generate", *options, cwd=elsewhere)
    assert done.returncode == 0 and '"new_tokens": ' in done.stdout, done.stderr


def test_a_mistake_is_one_line(environment: Path, elsewhere: Path) -> None:
    done = run(environment / "bin" / "teal-quantize", "--mode", "int5", "-o", "x", cwd=elsewhere)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_options(environment: Path, elsewhere: Path, shell: str) -> None:
    done = run(environment / "bin" / "teal-serve", "--print-completion", shell, cwd=elsewhere)
    assert done.returncode == 0 and "--sparsity" in done.stdout and "teal-serve" in done.stdout, done.stderr


def test_public_names(environment: Path, elsewhere: Path) -> None:
    """All that a program may import from teal, each from the installed copy."""
    script = """
import sys, teal
from teal import Engine, SamplingParams, SparsityPlan, generate_batch, quantize, sparsify
named = (Engine, SamplingParams, SparsityPlan, generate_batch, quantize, sparsify)
assert sorted(n.__name__ for n in named) == sorted(teal.__all__), teal.__all__
print(*sorted({sys.modules[n.__module__].__file__ for n in named}), sep="\\n")
"""
    done = run(environment / "bin" / "python", "-c", script, cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(Path(line).is_relative_to(environment) for line in done.stdout.splitlines()), done.stdout


@pytest.mark.usefixtures("default_folder")
def test_the_readme_example_runs_elsewhere(environment: Path, elsewhere: Path) -> None:
    *_, speed, _ = run_readme_program(elsewhere, environment / "bin" / "python")
    assert float(speed) > 1


def test_the_checkout_runs_without_being_installed(tiny_folder: Path, elsewhere: Path) -> None:
    """From the checkout's folder and from another one."""
    options = ("--checkpoint", tiny_folder, "--prompt", "The", "--max-new-tokens", "2", "--dtype", "fp32")
    for folder in (ROOT, elsewhere):
        done = run(sys.executable, ROOT / "generate.py", *options, cwd=folder)
        assert done.returncode == 0, done.stderr
