"""Ctrl-C ends a command soon, whatever it is doing: code 130, one word on stderr, no traceback. By real signals.

A second is what a user waits; the tests allow for a machine that is busy with other tests.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT, own_cache

SOON_S = 10
# Programs that would run for minutes, each deaf to Ctrl-C in its own way. They say "go" when they have begun.
STUBBORN = {
    "within a call into C": "print('go', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 500_000_000)",
    "swallowed by a library": (
        "print('go', flush=True)\n    while True:\n        try:\n            time.sleep(1)\n"
        "        except BaseException:\n            pass"
    ),
    "in a slow clean-up": (
        "try:\n        print('go', flush=True); time.sleep(600)\n    finally:\n        time.sleep(600)"
    ),
    "turned into another error": (
        "try:\n        print('go', flush=True); time.sleep(600)\n    except BaseException:\n"
        "        raise ImportError('torch failed to initialise')"
    ),
    "with a thread that stays": (
        "threading.Thread(target=time.sleep, args=(600,)).start()\n    print('go', flush=True); time.sleep(600)"
    ),
}


def start(*command: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
        text=True, cwd=ROOT, env=os.environ | environment, start_new_session=True,
    )  # fmt: skip


def interrupt(process: "subprocess.Popen[str]", times: int = 1) -> str:
    """Send SIGINT, several times if asked; check how the process ends. Returns what it wrote on stderr since.

    Compilers that it leaves behind would take both cores for another 20 s.
    """
    begin = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the process, if it is still there, and its children
    assert time.monotonic() - begin < SOON_S
    assert process.returncode == 130, err
    assert "Traceback" not in err and "Exception ignored" not in err, err
    assert err.strip().splitlines()[-1] == "interrupted" and err.count("interrupted") == 1, err
    return err


@pytest.mark.parametrize("times", [1, 3], ids=["once", "three times"])
@pytest.mark.parametrize("body", STUBBORN.values(), ids=STUBBORN)
def test_the_deaf_end_too(body: str, times: int) -> None:
    imports = "from teal.cli import command_line as cli\nimport hashlib, threading, time\n"
    program = f"{imports}def main():\n    {body}\ncli.run(main)"
    process = start("-c", program)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    interrupt(process, times)


def test_a_quick_clean_up_is_finished_first(tmp_path: Path) -> None:
    program = (
        "from teal.cli import command_line as cli\nimport pathlib, sys, time\n"
        "def main():\n    try:\n        print('go', flush=True); time.sleep(600)\n"
        "    finally:\n        time.sleep(0.2); pathlib.Path(sys.argv[1]).touch()\n"
        "cli.run(main)"
    )
    process = start("-c", program, str(tmp_path / "cleaned"))
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    interrupt(process, times=2)
    assert (tmp_path / "cleaned").exists()


def test_nothing_is_raised_while_a_module_is_imported(tmp_path: Path) -> None:
    """In torch's own import an exception at the wrong point ended the process by abort."""
    (tmp_path / "slow.py").write_text(
        "import time\ntry:\n    print('go', flush=True); time.sleep(60)\n"
        "except BaseException as error:\n    print(repr(error), flush=True)\n"
    )
    program = "from teal.cli import command_line as cli\ndef main():\n    import slow\ncli.run(main)"
    process = start("-c", program, PYTHONPATH=str(tmp_path))
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "\ninterrupted\n") and process.returncode == 130


def test_a_handler_of_its_own_is_left_alone() -> None:
    program = (
        "from teal.cli import command_line as cli\nimport signal, time\n"
        "def main():\n    signal.signal(signal.SIGINT, lambda *_: print('mine', flush=True))\n"
        "    print('go', flush=True); time.sleep(2)\n"
        "cli.run(main)"
    )
    process = start("-c", program)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "mine\n" and err == ""


TINY = ("--random-weights", "SmolLM2-135M", "--device", "cpu", "--dtype", "fp32")
COMMANDS = {
    "generate": ("generate.py", *TINY, "--prompt", "a", "--ignore-eos", "--no-compile", "--max-new-tokens", "5000"),
    "calibrate": ("calibrate.py", *TINY, "-o", "/tmp"),
    "evaluate": ("evaluate.py", *TINY, "--sparsity", "0"),
    "serve": ("serve.py", *TINY, "--port", "0"),
    "quantize": ("quantize.py", "--checkpoint", "TINY", "--mode", "int8", "-o", "OUT"),
    "bench": ("-m", "bench.decode", *TINY),
}


@pytest.mark.parametrize("module", ["numpy", "torch._utils", "torch.nn.modules", "tokenizers"])
@pytest.mark.parametrize("command", COMMANDS)
def test_during_imports(command: str, module: str, tmp_path: Path, tiny_folder: Path) -> None:
    arguments = [a.replace("OUT", str(tmp_path / "out")).replace("TINY", str(tiny_folder)) for a in COMMANDS[command]]
    process = start(*arguments, PYTHONPROFILEIMPORTTIME="1")
    assert process.stderr is not None
    for line in process.stderr:  # a line for each module that has been imported
        if re.search(rf"\| +{re.escape(module)}$", line):
            break
    else:
        process.communicate(timeout=60)
        pytest.skip(f"{command} does not import {module}")
    interrupt(process)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("command", ["generate", "calibrate", "evaluate"])
def test_at_any_moment(command: str, times: int, tmp_path: Path) -> None:
    """From the load on: at moments that differ between the commands and the runs."""
    cache = own_cache(tmp_path) if command == "evaluate" else tmp_path  # the others may be compiling the kernels
    process = start(*COMMANDS[command], PYTHONPROFILEIMPORTTIME="1", XDG_CACHE_HOME=str(cache))
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(r"\| +teal\.(decoding\.engine|calibration\.thresholds|evaluation\.quality)$", line):
            break
    time.sleep({"generate": 0.3, "calibrate": 1, "evaluate": 1.5}[command] * times)
    interrupt(process, times)


def test_during_the_download(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes connections and answers nothing
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        settings = {"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "", "UV_INDEX_URL": url}
        process = start("generate.py", "--prompt", "a", XDG_CACHE_HOME=str(tmp_path), **settings)
        index.settimeout(120)
        connection, _ = index.accept()
        with connection:
            interrupt(process)
