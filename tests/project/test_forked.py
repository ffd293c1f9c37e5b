"""tests/forked.py: a forked command ends and says what the same one in a fresh interpreter does."""

import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.forked import Forked, run_forked

PROGRAMS = {
    "streams": "import sys; print(sys.argv, sys.stdin.read(), __name__); print('é', file=sys.stderr)",
    "message": "import sys; sys.exit('said last')",
    "status": "raise SystemExit(7)",
    "at exit": "import atexit, os; atexit.register(print, os.environ['OF_A_TEST'], os.getcwd())",
    "signal": "import os; os.kill(os.getpid(), 9)",
    "module": "import runpy; runpy.run_module('teal.cli.quantize', run_name='__main__')",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_it_is_as_a_fresh_interpreter(program: str) -> None:
    arguments, environment = ("-c", program, "argument"), os.environ | {"OF_A_TEST": "1"}
    command = [sys.executable, *arguments]
    fresh = subprocess.run(command, cwd=ROOT, env=environment, input="Größe".encode(), capture_output=True)
    forked = run_forked(ROOT, arguments, "Größe".encode(), 60, environment)
    for field in ("returncode", "stdout", "stderr"):
        assert getattr(forked, field) == getattr(fresh, field), field


def test_one_that_takes_too_long_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        run_forked(ROOT, ("-c", "import time; time.sleep(600)"), b"", 0.5, os.environ)
    assert time.monotonic() - start < 60


def test_torch_is_there_already() -> None:
    program = "import sys; assert 'torch' in sys.modules and 'teal' not in sys.modules"
    assert Forked(ROOT, ("-c", program), os.environ).wait(60) == 0
