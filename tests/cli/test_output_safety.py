"""Nothing of the user's is replaced or removed, no two runs write one path, and what took minutes is not lost."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from teal import files
from teal.bench import report
from teal.calibration import thresholds as calibration
from teal.cli import calibrate, evaluate, quantize
from teal.errors import UserError
from teal.evaluation.plots import FIGURE, plot_quality
from teal.files import Output, atomic_folder, reserved
from teal.layers.quantized_linear import QuantConfig
from teal.options import ModelOptions
from teal.plan import PLAN, SparsityPlan
from tests.checkpoint.test_folders import tree
from tests.conftest import ROOT, assert_one_line_error

Command = Callable[..., tuple[int, str, str]]
INT8 = QuantConfig("int8", 32)


@pytest.fixture
def checkpoint(quantizable_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own, two folders deep."""
    folder = tmp_path / "work" / "models" / "tiny"
    folder.mkdir(parents=True)
    for file in quantizable_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def quantized(call: Command, checkpoint: Path, output: Path, *options: str) -> tuple[int, str, str]:
    return call(quantize.main, "--checkpoint", checkpoint, "--mode", "int8", "-o", output, *options)


@pytest.mark.parametrize(
    "spelling,reason",
    [
        ("{}", "is the checkpoint itself"),
        ("{}/../tiny/.", "is the checkpoint itself"),
        ("{}/..", "holds the checkpoint"),
        ("{}/../..", "holds the checkpoint"),
        ("{}/int8", "lies in the checkpoint"),
        ("{}/../../link", "is the checkpoint itself"),
        ("{}/../../link/int8", "lies in the checkpoint"),
        ("{}/../../up", "holds the checkpoint"),
    ],
)
def test_force_spares_the_checkpoint_by_whatever_name(
    spelling: str, reason: str, checkpoint: Path, call_main: Command
) -> None:
    top = checkpoint.parent.parent
    (top / "link").symlink_to(checkpoint)
    (top / "up").symlink_to(checkpoint.parent)
    (checkpoint / "int8").mkdir()
    before = tree(top)
    code, _, err = quantized(call_main, checkpoint, Path(spelling.format(checkpoint)), "--force")
    assert_one_line_error(code, err, "--output", reason)
    assert tree(top) == before


def test_force_spares_what_holds_the_file_that_was_converted(tmp_path: Path) -> None:
    """A GGUF file's converted folder lies in the cache; the file itself counts as the checkpoint, too."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds the checkpoint"):
        quantize.check_apart(tmp_path, tmp_path / "model.gguf")


def test_names_that_differ_in_case_are_one_folder_where_the_system_says_so(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = checkpoint.with_name("TINY")
    other.symlink_to(checkpoint)  # what a case-insensitive file system answers, but that resolve() keeps the spelling
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: self)
    with pytest.raises(UserError, match="is the checkpoint itself"):
        quantize.check_apart(other, checkpoint)


def test_force_replaces_what_quantize_wrote_and_nothing_else(
    checkpoint: Path, tmp_path: Path, call_main: Command
) -> None:
    out = tmp_path / "out"
    assert quantized(call_main, checkpoint, out)[0] == 0
    names = {p.name for p in out.iterdir()}
    assert_one_line_error(*quantized(call_main, checkpoint, out)[::2], "exists", "--force")
    link = tmp_path / "link"
    link.symlink_to(out)
    assert quantized(call_main, checkpoint, link, "--force")[0] == 0
    assert link.is_symlink() and {p.name for p in out.iterdir()} == names

    changes: list[tuple[str, Callable[[], object]]] = [
        ("holds thesis.txt", lambda: (out / "thesis.txt").write_text("years")),
        ("holds notes", lambda: (out / "notes").mkdir()),
        ("tokenizer.json, changed since", lambda: (out / "tokenizer.json").write_text("{}")),
        ("holds teal-0.5.json", lambda: (out / "teal-0.5.json").write_text("{}")),
        ("not a checkpoint that it quantized", lambda: (out / "config.json").write_text("{}")),
        ("not a checkpoint that it quantized", lambda: (out / "config.json").unlink()),
    ]
    for reason, change in changes:
        change()
        before = tree(out)
        code, _, err = quantized(call_main, checkpoint, out, "--force")
        assert_one_line_error(code, err, str(out), reason)
        assert tree(out) == before
        for extra in set(out.iterdir()) - {out / name for name in names}:
            extra.rmdir() if extra.is_dir() else extra.unlink()
        if reason.startswith("tokenizer"):
            (out / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())


def test_a_folder_of_an_older_release_has_no_list_and_is_known_by_its_names(
    checkpoint: Path, tmp_path: Path, call_main: Command
) -> None:
    out = tmp_path / "out"
    quantize.quantize_folder(checkpoint, out, INT8)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]["files"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "README.md").write_text("mine")
    assert_one_line_error(*quantized(call_main, checkpoint, out, "--force")[::2], "holds README.md")
    (out / "README.md").unlink()
    assert quantized(call_main, checkpoint, out, "--force")[0] == 0


def test_plans_of_the_original_weights_come_along(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "teal-0.5.json").write_text('{\n "format": "teal-plan"}')
    (checkpoint / "README.md").write_text("a card")
    quantize.quantize_folder(checkpoint, tmp_path / "out", INT8)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"README.md", "teal-0.5.json"} <= names


def test_others_can_read_what_is_written(checkpoint: Path, tmp_path: Path) -> None:
    quantize.quantize_folder(checkpoint, tmp_path / "out", INT8)
    with atomic_folder(tmp_path / "converted") as folder:
        assert folder is not None
        save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    mask = os.umask(0)
    os.umask(mask)
    for path in (*(tmp_path / "out").iterdir(), *(tmp_path / "converted").iterdir()):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name


def test_the_users_folder_in_the_place_of_unfinished_work_is_left(
    checkpoint: Path, tmp_path: Path, call_main: Command
) -> None:
    work = tmp_path / ".out.part"
    work.mkdir()
    (work / "thesis.txt").write_text("years")
    code, _, err = quantized(call_main, checkpoint, tmp_path / "out")
    assert_one_line_error(code, err, str(work), "move it away")
    assert (work / "thesis.txt").read_text() == "years" and not (tmp_path / "out").exists()


HOLDER = """
import sys
from pathlib import Path
from teal.files import Output, reserved
with reserved(Output("-o", Path(sys.argv[1]), None)):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_to_one_output_is_refused(
    checkpoint: Path, tmp_path: Path, call_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("plan.json", "out"):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / name)]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            output = tmp_path / "link" / ".." / tmp_path.name / name
            if name == "out":
                code, _, err = quantized(call_main, checkpoint, output)
            else:
                code, _, err = call_main(calibrate.main, "--checkpoint", checkpoint, "-o", output)
            holder.communicate("")
        assert_one_line_error(code, err, name, "another run")
        assert not (tmp_path / name).exists()
    assert quantized(call_main, checkpoint, tmp_path / "out")[0] == 0


# Options of a command that write a file to OUT
WRITES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "calibrate -o": (calibrate.main, ("-o", "OUT.json")),
    "calibrate --plot": (calibrate.main, ("-o", "FREE.json", "--plot", "OUT.folder")),
    "evaluate --csv": (evaluate.main, ("--csv", "OUT.csv")),
    "evaluate --plot": (evaluate.main, ("--plot", "OUT.png")),
    "bench.report -o": (report.main, ("-o", "OUT.html")),
    "quantize -o": (quantize.main, ("--mode", "int8", "-o", "OUT")),
}


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""
    for name in ("teal.checkpoint.loading.load_for_decoding", "teal.bench.report.measure"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("name", [name for name in WRITES if name != "quantize -o"])
def test_a_foreign_file_is_not_replaced(name: str, checkpoint: Path, tmp_path: Path, call_main: Command) -> None:
    main, options = WRITES[name]
    arguments = [o.replace("OUT", str(tmp_path / "out")).replace("FREE", str(tmp_path / "free")) for o in options]
    target = Path(arguments[-1])
    if target.suffix == ".folder":
        target.mkdir()
        target = target / "inputs-0.5.png"
    target.write_text('{"years": "of work"}')
    code, _, err = call_main(main, "--checkpoint", checkpoint, *arguments)
    assert_one_line_error(code, err, str(target), "exists and is not")
    assert target.read_text() == '{"years": "of work"}'


def test_a_plan_does_not_replace_a_models_config(checkpoint: Path, call_main: Command) -> None:
    before = tree(checkpoint)
    code, _, err = call_main(calibrate.main, "--checkpoint", checkpoint, "-o", checkpoint / "config.json")
    assert_one_line_error(code, err, "config.json", "is not a sparsity plan")
    assert tree(checkpoint) == before


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("name", WRITES)
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    name: str, checkpoint: Path, tmp_path: Path, call_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, options = WRITES[name]
    (tmp_path / "file").write_text("")
    inside = [o.replace("OUT", str(tmp_path / "file" / "out")).replace("FREE", str(tmp_path / "free")) for o in options]
    code, _, err = call_main(main, "--checkpoint", checkpoint, *inside)
    assert_one_line_error(code, err, str(tmp_path / "file"))

    locked = tmp_path / "locked"
    locked.mkdir()
    arguments = [o.replace("OUT", str(locked / "out")).replace("FREE", str(tmp_path / "free")) for o in options]
    original = files.tempfile.TemporaryFile

    def refusing(*_: object, dir: Path) -> object:  # as the system refuses a user who is not root
        if dir == locked:
            raise PermissionError(13, "Permission denied")
        return original(dir=dir)

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refusing)
    code, _, err = call_main(main, "--checkpoint", checkpoint, *arguments)
    assert_one_line_error(code, err, str(locked), "cannot be written (Permission denied)")


def test_an_empty_file_a_device_and_ones_own_file_are_written(tmp_path: Path) -> None:
    empty, own = tmp_path / "empty", tmp_path / "own"
    empty.write_text("")
    own.write_text('{\n "format": "teal-plan",')
    outputs = [Output("-o", path, PLAN) for path in (empty, own, Path(os.devnull))]
    with reserved(*outputs):
        pass
    with pytest.raises(UserError, match="is a folder"), reserved(Output("-o", tmp_path, PLAN)):
        pass


@pytest.mark.parametrize(
    "options,is_ours",
    [({"figsize": (9, 5), "dpi": 120}, True), ({"figsize": (8, 5), "dpi": 120}, False)],
    ids=["older release", "foreign"],
)
def test_figures_of_older_releases_are_replaced_and_others_of_matplotlib_are_not(
    options: dict[str, Any], is_ours: bool, tmp_path: Path
) -> None:
    from matplotlib.figure import Figure

    Figure(**options).savefig(tmp_path / "figure.png")
    assert files.is_kind(tmp_path / "figure.png", FIGURE) is is_ours
    plot_quality([], tmp_path / "figure.png")
    assert b"Source\x00TEAL" in (tmp_path / "figure.png").read_bytes()


def test_a_conversation_is_not_saved_over_another_file(tmp_path: Path) -> None:
    from teal.cli.conversation import Conversation

    talk = Conversation.__new__(Conversation)
    talk.messages = [{"role": "user", "content": "Hi"}]
    thesis, saved = tmp_path / "thesis.md", tmp_path / "chat.json"
    thesis.write_text("years")
    assert talk._command(f"/save {thesis}").startswith(f"error: /save {thesis}: exists and is not")
    assert thesis.read_text() == "years"
    for _ in range(2):
        assert talk._command(f"/save {saved}") == f"{saved}: 1 messages"


def test_ctrl_c_while_the_result_is_measured_keeps_the_plan(
    tiny_folder: Path, tmp_path: Path, call_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure_sparsity", interrupt)
    options = ("--checkpoint", tiny_folder, "--device", "cpu", "--dtype", "fp32", "--sequences", "2", "--length", "64")
    code, out, err = call_main(calibrate.main, *options, "--sparsity", "0.3,0.5", "-o", tmp_path)
    assert code == 130 and "Traceback" not in err
    paths = [Path(line) for line in out.splitlines()]
    assert [SparsityPlan.load(path).target for path in paths] == [0.3, 0.5]
    assert all(p.threshold > 0 for p in SparsityPlan.load(paths[0]).layers[0].values())


def test_ctrl_c_while_a_quick_plan_is_measured_keeps_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teal.calibration.choose import quick_plan
    from teal.checkpoint.loading import load_for_decoding

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = load_for_decoding(ModelOptions(str(tiny_folder), device="cpu", dtype="fp32"), sparse=True)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "measure_sparsity", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quick_plan(loaded, 0.5)
    assert quick_plan(loaded, 0.5, can_calibrate=False).target == 0.5


def test_rows_are_written_before_further_measurements_can_fail(
    tiny_folder: Path, tmp_path: Path, call_main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "more_measurements", interrupt)
    options = ("--checkpoint", tiny_folder, "--device", "cpu", "--dtype", "fp32", "--sparsity", "0", "--tokens", "64")
    assert call_main(evaluate.main, *options, "--csv", tmp_path / "rows.csv")[0] == 130
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 2


def test_an_error_about_a_temporary_file_names_the_users_path(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, files.atomic_file(tmp_path / "no" / "plan.json"):
        pass
    assert caught.value.filename == str(tmp_path / "no" / "plan.json")


def test_the_lock_of_an_output_is_free_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError), reserved(Output("-o", tmp_path / "x", None)):
        raise RuntimeError
    [lock] = (tmp_path / "teal" / "locks").iterdir()
    FileLock(lock).acquire(timeout=0).lock.release()
