"""The decode program of a model that two ranks share, each emulated in a thread of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teal.checkpoint.sharding import cut_of, cut_tensor, part_config
from teal.checkpoint.weights import empty_model, weight_targets
from teal.layers.team import Exchange, Team, share
from teal.model import ModelConfig, Transformer
from teal.parallel import Rank
from tests.conftest import assert_near
from tests.kernels.emulated_program import COMPILER, emulated_backend
from tests.kernels.program_models import (
    PROMPT,
    TINY,
    WIDE,
    expected_logits,
    prepared,
    random_dense,
    some_ids,
)
from tests.token_logits import step_logits

RANKS = 2
BIASED = replace(TINY, qkv_bias=True, o_bias=True)
WIDER = replace(WIDE, num_heads=16, num_kv_heads=16)  # parts of whole granules of groups along the input
GROUP = 32  # which divides the widths of parts
CPU = torch.device("cpu")


class Meeting:
    """Where threads hand each other tensors."""

    def __init__(self, channels: int) -> None:
        self.barrier = threading.Barrier(RANKS, timeout=120)
        self.given: list[Tensor] = [torch.empty(0)] * RANKS
        self.words = [torch.zeros(2, 2, RANKS, channels, dtype=torch.int64) for _ in range(RANKS)]

    def all(self, rank: int, x: Tensor) -> list[Tensor]:
        """What each of them gives."""
        self.given[rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class ThreadTeam(Team):
    """A Team of threads."""

    def __init__(self, rank: Rank, meeting: Meeting) -> None:
        super().__init__(rank, CPU)
        self.meeting, none = meeting, torch.empty(0)
        peers = torch.tensor([words.data_ptr() for words in meeting.words])
        self.exchange = Exchange(none, none, none, peers, tuple(meeting.words))

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.meeting.all(self.rank.index, x)).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self.meeting.all(self.rank.index, x), dim=-1)


def part_of(whole: Transformer, rank: Rank) -> Transformer:
    """A rank's part of a dense model."""
    part = empty_model(part_config(whole.config, rank), CPU, whole.dtype)
    tensors, cuts = weight_targets(whole), rank.cuts(whole.config)
    for name, target in weight_targets(part).items():
        cut = cut_of(name, cuts)
        target.copy_(tensors[name] if cut is None else cut_tensor(tensors[name], cut, name, target))
    return part


def together(work: Callable[[int], Tensor]) -> list[Tensor]:
    """What work gives for each rank, of threads that run at once."""
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(work, range(RANKS)))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "config,quant,seed",  # with which no entry is at its threshold
    [(BIASED, None, 0), (BIASED, "int8", 4), (BIASED, "int4", 0), (WIDER, "int4-input", 6)],
    ids=["floats", "int8", "int4", "int4-input"],
)
def test_steps_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig, quant: str | None, seed: int
) -> None:
    dense = random_dense(config, seed).half()
    meeting, backends = Meeting(config.hidden_size), []
    for i in range(RANKS):
        rank, folder = Rank(i, RANKS), tmp_path / str(i)
        folder.mkdir()
        part = prepared(part_of(dense, rank), quant, False, True, GROUP)
        backends.append(emulated_backend(share(part, ThreadTeam(rank, meeting), config), folder, monkeypatch))
    whole = prepared(dense, quant, False, True, GROUP)
    ids = some_ids(whole)
    found = together(lambda i: step_logits(backends[i], ids, PROMPT)[0])
    assert torch.equal(found[0], found[1])
    assert_near("logits", found[0], expected_logits(whole, ids), 2e-3)
    assert all(words.any() for words in meeting.words)
