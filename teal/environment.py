"""What OpenMP must know before torch loads it. Importing teal prepares it; imports nothing heavy.

By default threads spin for milliseconds while they wait for work. Beside another busy process they spend their share
of a core on that, and are paused when work comes. An elementwise operation then took 157 ms instead of 0.1. And OpenMP
counts the cores that it may use, but not how much of them a container's CPU quota leaves.
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what a user may have set to say how threads wait
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Turns that a waiting thread of libgomp, torch's OpenMP on Linux, spins before it sleeps: some 60 us. Tokens/s of the
# default model in bf16 on 2 Zen 5 cores, dense / 50% sparse:
#                               300,000 (default)  10,000     3,000      2,000      1,000     500
#   alone                       53 / 72            54 / 72    53 / 71    50 / 66    46 / 61   44 / 60
#   beside one busy process     16 / 21            13 / 14    21 / 26    22 / 26    28 / 36   32 / 42
# 3,000 costs nothing alone. Under more load the default fell below 2 tokens/s.
SPIN_COUNT = 3000


def prepare(variables: MutableMapping[str, str], cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> None:
    """Set in variables what a decoder needs of OpenMP, unless the user has decided it."""
    if not any(name in variables for name in WAITING):
        variables["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    quota = cpu_quota(cgroups, own)
    if quota is not None and not any(name in variables for name in THREADS):
        threads = max(1, math.floor(quota))
        if threads < usable_cores():
            variables["OMP_NUM_THREADS"] = str(threads)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(cgroups: Path, own: Path) -> float | None:
    """Cores' worth of time that this process's control groups allow, the least of them; None without a limit."""
    return min(_quotas(cgroups, own), default=None)


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """The limits of the groups named in own (lines "id:controllers:path") and of all groups above them."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        for root in [cgroups] if not controllers else [cgroups / controllers, cgroups / "cpu"]:
            group = root / path.lstrip("/")
            for folder in (group, *group.parents):
                yield from _quota(folder)
                if folder == root:
                    break


def _quota(folder: Path) -> Iterator[float]:
    """The limit that a group states, if any: cpu.max ("quota period" or "max period") or version 1's two files."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota, period = ((folder / f"cpu.cfs_{n}_us").read_text(encoding="utf-8") for n in ("quota", "period"))
        if quota != "max" and float(quota) > 0 and float(period) > 0:
            yield float(quota) / float(period)
    except (OSError, ValueError):
        return


def prepare_process() -> None:
    """prepare, for this process: before torch is imported."""
    prepare(os.environ)
