"""The choice of dtype on a CPU: by the processor's features, else by a measurement that other load cannot turn."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teal import hardware

Timer = Callable[[torch.dtype, bool], Callable[[], float]]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "cache_folder", lambda name: tmp_path)  # of this file alone: not of compiled kernels


@pytest.fixture
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})


def timers(monkeypatch: pytest.MonkeyPatch, bf16: Callable[[], float], fp32: Callable[[], float]) -> None:
    """Have the measurement take these as the seconds of either dtype."""
    times = {torch.bfloat16: bf16, torch.float32: fp32}
    monkeypatch.setattr(hardware, "_token_timer", lambda dtype, sparse: times[dtype])


@pytest.mark.parametrize("feature", hardware.BF16_FEATURES)
def test_a_processor_that_multiplies_bf16_is_not_timed(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, feature: True})
    monkeypatch.setattr(hardware, "_token_timer", lambda *_: pytest.fail("timed"))
    choice = hardware.pick_dtype("auto", torch.device("cpu"), sparse=True)
    assert choice.dtype == torch.bfloat16 and feature in choice.reason


def test_named_dtypes_are_taken_as_they_are() -> None:
    for name, dtype in hardware.DTYPES.items():
        assert hardware.pick_dtype(name, torch.device("cpu"), sparse=False).dtype == dtype


@pytest.mark.usefixtures("plain_processor")
def test_the_choice_is_timed_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    timers(monkeypatch, lambda: 1.0, lambda: 2.0)
    assert hardware.faster_cpu_dtype(sparse=True).dtype == torch.bfloat16
    timers(monkeypatch, lambda: 1.0, lambda: 0.5)
    assert hardware.faster_cpu_dtype(sparse=True).dtype == torch.bfloat16
    choice = hardware.faster_cpu_dtype(sparse=False)
    assert choice.dtype == torch.float32 and choice.reason == "bf16 took 2.00 times as long as fp32"


@pytest.mark.usefixtures("plain_processor")
@pytest.mark.parametrize("content", ["[]", "{", '{"x": 1}', "null"])
def test_a_damaged_record_is_measured_anew(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timers(monkeypatch, lambda: 3.0, lambda: 1.0)
    hardware.faster_cpu_dtype(sparse=True)
    path = hardware.cache_folder("hardware") / "bf16_over_fp32.json"
    [key] = json.loads(path.read_text())
    for damaged in (content, json.dumps({key: "fp32"}), json.dumps({key: [1.0]})):
        path.write_text(damaged)
        assert hardware.faster_cpu_dtype(sparse=True).dtype == torch.float32


def loaded(seconds: float, seed: int, share: float = 0.6) -> Callable[[], float]:
    """Times on a machine with other work: most samples take up to 6 times as long."""
    chance = random.Random(seed)
    return lambda: seconds * (chance.uniform(1.2, 6) if chance.random() < share else chance.uniform(1, 1.05))


@pytest.mark.usefixtures("plain_processor")
@pytest.mark.parametrize("bf16,fp32,expected", [(1.0, 1.5, torch.bfloat16), (1.0, 1.0, torch.bfloat16),
                                                (30.0, 1.0, torch.float32)])  # fmt: skip
def test_noise_does_not_turn_the_choice(
    bf16: float, fp32: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for seed in range(300):
        (tmp_path / "bf16_over_fp32.json").unlink(missing_ok=True)
        timers(monkeypatch, loaded(bf16, seed), loaded(fp32, 1000 + seed))
        assert hardware.faster_cpu_dtype(sparse=True).dtype == expected, f"seed {seed}"


@pytest.mark.usefixtures("plain_processor")
def test_rounds_that_disagree_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round was under a load that only bf16 met."""
    turns = iter([5.0] * hardware.TURNS + [1.0] * 99)
    timers(monkeypatch, lambda: next(turns), lambda: 1.0)
    choice = hardware.faster_cpu_dtype(sparse=True)
    assert choice.dtype == torch.bfloat16 and choice.reason == "bf16 took 1.00 times as long as fp32"


@pytest.mark.usefixtures("plain_processor")
def test_bf16_is_taken_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(([5.0] * hardware.TURNS + [1.0] * hardware.TURNS) * 9)
    timers(monkeypatch, lambda: next(turns), lambda: 1.0)
    choice = hardware.faster_cpu_dtype(sparse=True)
    assert choice.dtype == torch.bfloat16 and "in doubt" in choice.reason


@pytest.mark.usefixtures("plain_processor")
def test_emulated_matrix_products_rule_bf16_out(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.Tensor.__matmul__

    def emulated(x: torch.Tensor, weight: Any) -> torch.Tensor:
        time.sleep(0.2 if x.dtype == torch.bfloat16 else 0.0)
        return product(x.float(), weight.float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", emulated)
    assert hardware.faster_cpu_dtype(sparse=True).dtype == torch.float32


def test_stats_say_what_was_chosen_and_why(
    tiny_folder: Path, invoke: Callable[..., tuple[int, str, str]]
) -> None:  # fmt: skip
    options = ("--checkpoint", tiny_folder, "--device", "cpu", "--prompt", "x", "--max-new-tokens", "4", "--ignore-eos")
    reason = hardware.faster_cpu_dtype(sparse=False).reason
    assert f": {reason}\n" in invoke(*options, "--stats")[2]
    assert reason not in invoke(*options)[2]
    assert "dtype float32: as asked for\n" in invoke(*options, "--stats", "--dtype", "fp32")[2]
