"""What OpenMP is told before torch loads: how to wait, how many threads; and that a user's word goes before ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from teal import environment
from tests.conftest import ROOT

MISSING = Path("/nonexistent")


def group(root: Path, files: dict[str, str], lines: str) -> tuple[Path, Path]:
    """A tree of control groups, and the file that says which ones are this process's."""
    for name, content in files.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (root / "own").write_text(lines, encoding="utf-8")
    return root / "groups", root / "own"


QUOTAS: dict[str, tuple[dict[str, str], str, float | None]] = {
    "version-2": ({"a/cpu.max": "150000 100000\n"}, "0::/a\n", 1.5),
    "parent-is-tighter": ({"cpu.max": "max 100000", "a/cpu.max": "50000 100000", "a/b/cpu.max": "3 1"}, "0::/a/b", 0.5),
    "unlimited": ({"a/cpu.max": "max 100000\n"}, "0::/a\n", None),
    "of-a-container": ({"cpu.max": "200000 100000"}, "0::/docker/1f3e\n", 2.0),
    "outside-the-namespace": ({"cpu.max": "200000 100000"}, "0::/../../x\n", 2.0),
    "version-1": (
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
        "4:memory:/m\n3:cpu,cpuacct:/a\n",
        2.5,
    ),
    "version-1-unlimited": ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n", None),
    "unreadable": ({"cpu.max": "soon"}, "0::/\n", None),
    "no-files": ({}, "0::/\n", None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_the_quota_is_read(name: str, tmp_path: Path) -> None:
    files, lines, expected = QUOTAS[name]
    assert environment.cpu_quota(*group(tmp_path, files, lines)) == expected


def test_without_control_groups_there_is_no_quota() -> None:
    assert environment.cpu_quota(MISSING, MISSING) is None


@pytest.mark.parametrize(
    "quota,cores,threads", [("150000", 8, "1"), ("50000", 8, "1"), ("300000", 8, "3"), ("300000", 2, None)]
)
def test_threads_do_not_exceed_the_quota(
    quota: str, cores: int, threads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "usable_cores", lambda: cores)
    groups = group(tmp_path, {"cpu.max": f"{quota} 100000"}, "0::/\n")
    variables: dict[str, str] = {}
    environment.prepare(variables, *groups)
    assert variables.get("OMP_NUM_THREADS") == threads
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        chosen = {name: "5"}
        environment.prepare(chosen, *groups)
        assert chosen.pop("GOMP_SPINCOUNT") and chosen == {name: "5"}


@pytest.mark.parametrize("name,value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")])
def test_a_users_way_of_waiting_wins(name: str, value: str) -> None:
    variables = {name: value}
    environment.prepare(variables, MISSING, MISSING)
    assert variables == {name: value}


MODULES = (
    "teal.cli.command_line",
    "teal.decoding.engine",
    "bench.decode",
    *(f"teal.cli.{name}" for name in ("generate", "serve", "calibrate", "evaluate", "quantize")),
)


@pytest.mark.parametrize("module", MODULES)
def test_it_is_done_before_torch_loads(module: str) -> None:
    """Noted at the moment when torch is first looked for, in a process of its own, which then ends."""
    script = (
        "import os, sys\n"
        "class Note:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Note())\n"
        f"import {module}\nimport torch\n"
    )
    bare = {name: value for name, value in os.environ.items() if name not in environment.WAITING}
    for given in ({}, {"GOMP_SPINCOUNT": "31"}):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=bare | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == given.get("GOMP_SPINCOUNT", str(environment.SPIN_COUNT))


def test_torch_takes_the_number_of_threads(tmp_path: Path) -> None:
    """As a command under a quota of one core does, on a machine of any number of them."""
    groups, own = group(tmp_path, {"cpu.max": "100000 100000"}, "0::/\n")
    script = (
        "import os; from pathlib import Path; from teal import environment\n"
        "environment.usable_cores = lambda: 4\n"
        f"environment.prepare(os.environ, Path({str(groups)!r}), Path({str(own)!r}))\n"
        "import teal.decoding.engine, torch; print(torch.get_num_threads())\n"
    )
    bare = {name: value for name, value in os.environ.items() if name not in environment.THREADS}
    for given, threads in (({}, "1"), ({"OMP_NUM_THREADS": "2"}, str(min(2, environment.usable_cores())))):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=bare | given, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == threads
