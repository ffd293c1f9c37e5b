"""The decode program of a model that two or four ranks share, each emulated in a thread of its own."""

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
from teal.errors import UserError
from teal.layers.team import Exchange, SharedWords, Team, share
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

BIASED = replace(TINY, qkv_bias=True, o_bias=True)
FOUR = replace(BIASED, intermediate_size=256, num_kv_heads=4)
WIDER = replace(WIDE, num_heads=16, num_kv_heads=16)  # parts of whole granules of groups along the input
GROUP = 32  # which divides the widths of parts
CPU = torch.device("cpu")


class Meeting:
    """Where threads hand each other tensors."""

    def __init__(self, ranks: int, channels: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=120)
        self.given: list[Tensor] = [torch.empty(0)] * ranks
        self.words = [torch.zeros(2, 2, ranks, channels, dtype=torch.int64) for _ in range(ranks)]

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
        self.meeting = meeting

    def step_words(self, channels: int) -> SharedWords:
        words = self.meeting.words
        assert words[0].shape[-1] == channels
        return SharedWords(words[self.rank.index], torch.tensor([of_rank.data_ptr() for of_rank in words]))

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


def together(ranks: int, work: Callable[[int], Tensor]) -> list[Tensor]:
    """What work gives for each rank, of threads that run at once."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, range(ranks)))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "config,ranks,quant,seed",  # with which no entry is at its threshold
    [
        (BIASED, 2, None, 0), (BIASED, 2, "int8", 4), (BIASED, 2, "int4", 0), (WIDER, 2, "int4-input", 6),
        (FOUR, 4, None, 0), (FOUR, 4, "int4", 4),
    ],
    ids=["floats", "int8", "int4", "int4-input", "floats of four", "int4 of four"],
)  # fmt: skip
def test_steps_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ModelConfig, ranks: int, quant: str | None, seed: int
) -> None:
    dense = random_dense(config, seed).half()
    meeting, backends = Meeting(ranks, config.hidden_size), []
    for i in range(ranks):
        rank, folder = Rank(i, ranks), tmp_path / str(i)
        folder.mkdir()
        part = prepared(part_of(dense, rank), quant, False, True, GROUP)
        backends.append(emulated_backend(share(part, ThreadTeam(rank, meeting), config), folder, monkeypatch))
    whole = prepared(dense, quant, False, True, GROUP)
    ids = some_ids(whole)
    found = together(ranks, lambda i: step_logits(backends[i], ids, PROMPT)[0])
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert_near("logits", found[0], expected_logits(whole, ids), 2e-3)
    assert all(words.any() for words in meeting.words)


def test_models_share_no_words_of_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of one would be taken for the other's. Sums of rows take turns, in room for the wider one."""
    none = torch.empty(0)
    monkeypatch.setattr(Team, "_words", lambda _, *shape: SharedWords(torch.zeros(shape), none))
    team = Team(Rank(0, 2), torch.device("cuda"))
    first, second = team.step_words(64), team.step_words(64)  # both alive
    assert first.words.data_ptr() != second.words.data_ptr()
    team.exchange = Exchange(none, none, none, 64)
    team.share_memory(32)
    with pytest.raises(UserError, match="a model of 128 channels after one of 64"):
        team.share_memory(128)
