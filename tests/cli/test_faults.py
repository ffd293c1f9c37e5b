"""Whatever fails, nothing half-written is left and the next run succeeds; whatever is typed, there is no traceback.

CI runs a part of each; pytest tests/cli/test_faults.py --full runs all file operations and 400 bad command lines.
"""

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teal.checkpoint.config import load_config
from teal.checkpoint.families import FAMILIES
from teal.cli import calibrate, evaluate, generate, quantize, serve
from teal.errors import UserError
from teal.files import atomic_file, cache_folder
from teal.kernels.cpu.native import native_kernels
from teal.options import ModelOptions
from teal.plan import SparsityPlan
from tests.conftest import changed, run_command, tiny_config
from tests.faults import failing, watching

Command = Callable[..., tuple[int, str, str]]


@dataclass(frozen=True)
class Writer:
    """A command that writes files: how to call it with a folder to write to, and what it leaves there."""

    main: Callable[[], None]
    options: tuple[str, ...]
    results: tuple[str, ...]

    def arguments(self, checkpoint: Path, folder: Path) -> list[str]:
        return ["--checkpoint", str(checkpoint), *(option.replace("OUT", str(folder)) for option in self.options)]


SHORT = ("--sequences", "1", "--length", "64", "--device", "cpu", "--dtype", "fp32")
WRITERS = {
    "calibrate": Writer(calibrate.main, ("--sparsity", "0.4,0.5", *SHORT, "-o", "OUT/plans"), ("plans",)),
    "quantize": Writer(quantize.main, ("--mode", "int4", "-o", "OUT/model"), ("model",)),
    "evaluate": Writer(
        evaluate.main,
        ("--tokens", "64", "--csv", "OUT/rows.csv", "--plot", "OUT/quality.png", *SHORT),
        ("rows.csv", "quality.png"),
    ),
    "generate": Writer(
        generate.main,
        ("--sparsity", "0.4", "--prompt", "The", "--max-new-tokens", "3", "--device", "cpu", "--dtype", "fp32"),
        (),
    ),
}


@pytest.fixture
def is_full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


def contents(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Files of the results, by path; dates and times of day are not compared."""
    found = {}
    for name in names:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path] * path.exists():
            if file.is_file() and file.suffix != ".part":  # of a process killed
                found[str(file.relative_to(folder))] = _timeless(file)
    return found


def _timeless(file: Path) -> bytes:
    if file.suffix != ".csv":
        return file.read_bytes()
    header, *rows = file.read_text(encoding="utf-8").splitlines()
    kept = [i for i, name in enumerate(header.split(",")) if not name.endswith("_s")]
    return "\n".join(",".join(row.split(",")[i] for i in kept) for row in (header, *rows)).encode()


class Trial:
    """A writer with a folder of its own, and what an undisturbed run leaves."""

    def __init__(self, name: str, checkpoint: Path, tmp: Path, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writer, self.checkpoint, self.tmp, self.call, self.patch = (
            WRITERS[name],
            checkpoint,
            tmp,
            call,
            monkeypatch,
        )
        native_kernels()
        self.compiled = cache_folder("kernels")
        self.trials = 0
        self.operations = 0

        def count(n: int) -> None:
            self.operations = n + 1

        folder = self.fresh()
        with watching(folder, count):
            code, _, err = self.run(folder)
        assert code == 0, err
        self.expected = contents(folder, self.writer.results)
        assert self.operations > 2 and len(self.expected) >= len(self.writer.results)

    def fresh(self) -> Path:
        """An empty folder that also holds the cache."""
        self.trials += 1
        folder = self.tmp / str(self.trials)
        (folder / "plans").mkdir(parents=True)
        shutil.copytree(self.compiled, folder / "cache" / "teal" / "kernels")  # compiling takes seconds
        self.patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return folder

    def run(self, folder: Path) -> tuple[int, str, str]:
        return self.call(self.writer.main, *self.writer.arguments(self.checkpoint, folder))

    def some(self, is_full: bool, count: int) -> list[int]:
        """Operations to fail at: all, or so many spread evenly with the first and the last."""
        last = self.operations - 1
        return list(range(last + 1)) if is_full else sorted({round(i * last / (count - 1)) for i in range(count)})

    def check_after_failure(self, folder: Path, killed: bool = False) -> None:
        """What is there is whole, and the command run again gives what it should; only a killed one leaves a part."""
        for name, content in contents(folder, self.writer.results).items():
            # a plan is written once its thresholds are found, and again with the sparsities it achieves
            unmeasured = re.sub(rb'"achieved": [\d.]+', b'"achieved": null', self.expected[name])
            assert content in (self.expected[name], unmeasured), f"{name} is half-written"
        code, _, err = self.run(folder)
        finished = code == 1 and "--force" in err  # a finished folder is not replaced unasked
        assert code == 0 or finished, err
        assert contents(folder, self.writer.results) == self.expected
        left = [p for p in folder.rglob("*") if p.name.endswith(".part")]
        assert not left or killed, left


@pytest.fixture(params=WRITERS)
def trial(
    request: pytest.FixtureRequest, tmp_path: Path, quantizable_folder: Path, call_main: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> Trial:  # fmt: skip
    return Trial(request.param, quantizable_folder, tmp_path, call_main, monkeypatch)


def test_a_full_disk_leaves_nothing_half_written(trial: Trial, is_full: bool) -> None:
    for number in trial.some(is_full, 3):
        folder = trial.fresh()
        with watching(folder, failing(number, errno.ENOSPC)):
            code, _, err = trial.run(folder)
        assert code == 0 or "error: " in err.splitlines()[-1], (number, err)
        assert "Traceback" not in err
        trial.check_after_failure(folder)


def test_a_folder_that_cannot_be_written_is_one_line(trial: Trial) -> None:
    folder = trial.fresh()
    with watching(folder, failing(0, errno.EROFS)):
        code, _, err = trial.run(folder)
    assert code == 1 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert str(folder) in err or "a file" in err
    trial.check_after_failure(folder)


def test_kill_9_leaves_nothing_half_written(trial: Trial, is_full: bool) -> None:
    script = f"{trial.writer.main.__module__.rpartition('.')[2]}.py"
    for number in range(trial.operations) if is_full else [trial.operations - 1]:
        folder = trial.fresh()
        arguments = trial.writer.arguments(trial.checkpoint, folder)
        done = run_command("-m", "tests.faults", str(number), folder, script, *arguments, timeout=300)
        assert done.returncode == -signal.SIGKILL, (number, done.stderr)
        trial.check_after_failure(folder, killed=True)


def test_a_device_is_written_to_and_a_link_followed(tmp_path: Path) -> None:
    master, slave = os.openpty()
    device = Path(os.ttyname(slave))
    with atomic_file(device) as path:
        path.write_text("text", encoding="utf-8")
    assert stat.S_ISCHR(device.stat().st_mode) and os.read(master, 10) == b"text"
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    with atomic_file(link) as path:
        path.write_text("text", encoding="utf-8")
    assert link.is_symlink() and file.read_text(encoding="utf-8") == "text"
    with pytest.raises(IsADirectoryError), atomic_file(tmp_path) as path:
        path.write_text("text", encoding="utf-8")


BAD_VALUES = (
    "", " ", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e99", "99999999999999999999", "abc", "0.5,", ",", "int4",
    "é",
    "🙂", "\x7f", ".", "/no/such/file", "a" * 5000, "--", "0.5.5", "None", "{}", "true",
)  # fmt: skip
BAD_FILES = {
    "empty": b"", "garbage": bytes(range(256)), "list.json": b"[1, 2]", "cut.json": b'{"version": 1, "layers": [',
    "deep.json": b"[" * 100_000, "odd.json": b'{"version": "x", "layers": 3}', "line.jsonl": b'{"text": 5}\n',
    "model.gguf": b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "latin.txt": "caf\xe9".encode("latin-1"),
}  # fmt: skip
QUICK: dict[Callable[[], None], tuple[str, ...]] = {
    generate.main: ("--prompt", "The", "--max-new-tokens", "2", "--device", "cpu", "--no-compile"),
    calibrate.main: ("--sequences", "1", "--length", "16", "--device", "cpu", "-o", "OUT"),
    evaluate.main: ("--tokens", "16", "--sequences", "1", "--length", "16", "--device", "cpu"),
    quantize.main: ("--mode", "int8", "-o", "OUT"),
    serve.main: ("--checkpoint", "/no/such/model"),  # a good one would serve
}
# They take minutes, print scripts, or compile.
LEFT_OUT = {"--help", "--print-completion", "--compile", "--no-compile", "--lm-eval", "--chat", "--draft-quant"}


def bad_command(chance: random.Random, checkpoint: Path, folder: Path) -> tuple[Callable[[], None], list[str]]:
    """A command's main and arguments of which one to three are arbitrary."""
    main = chance.choice(list(QUICK))
    parser: argparse.ArgumentParser = sys.modules[main.__module__].build_parser()
    options = {a.option_strings[-1]: a for a in parser._actions if a.option_strings and a.dest != "output"}
    arguments = ["--checkpoint", str(checkpoint), *(o.replace("OUT", str(folder / "out")) for o in QUICK[main])]
    for name in chance.sample(sorted(set(options) - LEFT_OUT), chance.randint(1, 3)):
        value = chance.choice([*BAD_VALUES, *(str(folder / file) for file in BAD_FILES)])
        arguments += [name] if options[name].nargs == 0 else [name, value]
    if chance.random() < 0.1:
        arguments.append(chance.choice(["--no-such-option", "stray", "--sparsity"]))
    return main, arguments


def test_bad_input_never_shows_a_traceback(
    tiny_folder: Path, tmp_path: Path, call_main: Command, is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where a stray value of an option for a file to write ends up
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
    refused = 0
    for seed in range(400 if is_full else 60):
        main, arguments = bad_command(random.Random(seed), tiny_folder, tmp_path)
        try:
            code, _, err = call_main(main, *arguments)
        except Exception as error:
            raise AssertionError(f"{main.__module__}.py {arguments}") from error
        assert code in (0, 1, 2), (main.__module__, arguments, err)
        if code:
            refused += 1
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and "Traceback" not in err, (arguments, err)
    assert refused > (200 if is_full else 30)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


paths = st.lists(st.integers(0, 50), min_size=1, max_size=4)


@pytest.mark.parametrize("family", FAMILIES)
@given(path=paths, value=json_values)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_is_read_or_refused(family: str, tmp_path: Path, path: list[int], value: Any) -> None:
    config = tiny_config(family).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(changed(config, path, value)), encoding="utf-8")
    try:
        load_config(tmp_path)
    except UserError as error:
        assert "\n" not in str(error) and str(tmp_path / "config.json") in str(error)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> SparsityPlan:
    from teal.calibration.choose import quick_plan
    from teal.checkpoint.loading import load_for_decoding

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        options = ModelOptions(str(tiny_folder), device="cpu", dtype="fp32")
        return quick_plan(load_for_decoding(options, sparse=True), 0.5)


@given(path=paths, value=json_values)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_plan_is_read_or_refused(plan: SparsityPlan, tmp_path: Path, path: list[int], value: Any) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    file.write_text(json.dumps(changed(json.loads(file.read_text(encoding="utf-8")), path, value)), encoding="utf-8")
    try:
        read = SparsityPlan.load(file)
    except UserError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    else:
        read.save(file)
        assert SparsityPlan.load(file) == read
