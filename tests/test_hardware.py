"""The choice of dtype on a CPU."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hardware


def test_the_choice_is_timed_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seconds = {torch.bfloat16: 1.0, torch.float32: 2.0}
    monkeypatch.setattr(hardware, "_time_token", lambda dtype, sparse: seconds[dtype])
    assert hardware.faster_cpu_dtype(sparse=True) == torch.bfloat16
    seconds[torch.float32] = 0.5
    assert hardware.faster_cpu_dtype(sparse=True) == torch.bfloat16
    assert hardware.faster_cpu_dtype(sparse=False) == torch.float32


def test_emulated_matrix_products_rule_bf16_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    product = torch.Tensor.__matmul__

    def emulated(x: torch.Tensor, weight: Any) -> torch.Tensor:
        time.sleep(0.2 if x.dtype == torch.bfloat16 else 0.0)
        return product(x.float(), weight.float())

    monkeypatch.setattr(torch.Tensor, "__matmul__", emulated)
    assert hardware.faster_cpu_dtype(sparse=True) == torch.float32
