"""Folders that appear whole or not at all: by an exception, by kill -9, by several processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teal.files import atomic_folder, replace_folder, restore_folder
from tests.conftest import ROOT


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under folder by its path, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_appears_when_it_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError, match="halfway"), atomic_folder(target) as temporary:
        assert temporary is not None
        (temporary / "a").write_text("x")
        raise RuntimeError("halfway")
    assert not target.exists()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    with atomic_folder(target) as temporary:
        assert temporary is not None
        (temporary / "a").write_text("x")
    assert (target / "a").read_text() == "x"
    with atomic_folder(target) as temporary:
        assert temporary is None


RACE_SCRIPT = """
import sys, time
from pathlib import Path
from teal.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as temporary:
    if temporary is not None:
        for i in range(20):
            (temporary / str(i)).write_text("x")
            time.sleep(0.02)
        print("made")
print(len(list(Path(sys.argv[1]).iterdir())))
"""


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE_SCRIPT, str(tmp_path / "model")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    outputs = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert sum("made" in output for output in outputs) == 1
    assert all(output[-1] == "20" for output in outputs)


def test_killed_conversion_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE_SCRIPT, str(tmp_path / "model")]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    while not list(tmp_path.glob(".model.part/*")):
        assert victim.poll() is None
    victim.kill()
    victim.wait()
    assert not (tmp_path / "model").exists()
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.split() == ["made", "20"]


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OSError):
        replace_folder(new, target)  # there is no new one
    assert tree(tmp_path) == {"target/old": b"old"}


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The inodes that fsync was called for."""
    found = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: found.add(os.fstat(descriptor).st_ino))
    return found


@pytest.mark.parametrize("there", [False, True], ids=["new", "in place of another"])
def test_the_disk_has_what_is_renamed(there: bool, flushed: set[int], tmp_path: Path) -> None:
    """After a loss of power a folder whose files were not written would stand where a good one was."""
    made, target = tmp_path / "made", tmp_path / "target"
    with atomic_folder(made) as folder:
        assert folder is not None
        (folder / "shard").write_text("weights")
        assert not flushed
    inodes = {file.stat().st_ino for file in made.iterdir()}
    assert inodes == flushed
    if there:
        target.mkdir()
    flushed.clear()
    replace_folder(made, target)
    assert inodes == flushed and tree(target) == {"shard": b"weights"}


KILLED_BETWEEN = """
import os, signal, sys
from pathlib import Path
from teal import files
rename = Path.rename
def one_only(self, target):
    if self.name == "new":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = one_only
files.replace_folder(Path(sys.argv[1]) / "new", Path(sys.argv[1]) / "target")
"""


def test_an_old_folder_comes_back_after_kill_9_between_the_renames(tmp_path: Path) -> None:
    for name in ("new", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(tmp_path)], cwd=ROOT)
    assert not (tmp_path / "target").exists()
    restore_folder(tmp_path / "target")
    assert tree(tmp_path) == {"target/target": b"target", "new/new": b"new"}
