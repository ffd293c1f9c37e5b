"""The ranks that share a model (teal/parallel.py): how they add up and gather, and the modules that make them do so.

    x ─ norm ─ [q k v] ─ attention ─ [o] ─ Summed ─ + ─ norm ─ [gate up] ─ act(gate) * up ─ [down] ─ Summed ─ +

What few rows have is added by one kernel over memory that the GPUs see of each other (exchange_partials.py). Prompts,
and all that runs on CPUs, go through torch.distributed.
"""

import functools
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from teal.errors import ParameterError, UserError
from teal.model import ModelConfig, Transformer
from teal.options import LOCAL_RANK, MAX_ROWS, RANK, RANKS
from teal.parallel import Rank

LOST_S = 3.0  # for who watches the ranks to say which one ended, and why
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # of torch.distributed, by the device of the ranks
gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renamed it


@dataclass(slots=True)
class Exchange:
    """What exchange_partials.py needs beside the values, for rows of so many channels at most."""

    words: Tensor
    epochs: Tensor
    peers: Tensor
    channels: int


class SharedWords(NamedTuple):
    """Words int64 that the other ranks can write to, and their addresses on all ranks, int64 [ranks]."""

    words: Tensor
    peers: Tensor


class Team:
    """This process among those that share a model. All of them make the same calls in the same order."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        self.rank, self.device = rank, device
        self.exchange: Exchange | None = None
        self.in_step = False  # whether all run the same program, and none follows another's calls

    def __deepcopy__(self, _: Any) -> "Team":  # copies of a model are of the same ranks
        return self

    @property
    def group(self) -> Any:
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def share_memory(self, channels: int) -> None:
        """On GPUs: make room for the sums of MAX_ROWS rows of so many channels. Raises UserError."""
        if self.device.type != "cuda":
            return
        if self.exchange is not None:
            if channels > self.exchange.channels:
                raise UserError(
                    f"a model of {channels} channels after one of {self.exchange.channels}: several GPUs have room for "
                    "the first one's sums; load the wider model first"
                )
            return
        from teal.kernels.exchange_partials import programs_of

        words, peers = self._words(2, self.rank.count, MAX_ROWS * channels)
        epochs = torch.zeros(programs_of(MAX_ROWS, channels), dtype=torch.int32, device=self.device)
        self.exchange = Exchange(words, epochs, peers, channels)

    def step_words(self, channels: int) -> SharedWords:
        """For one model's steps as one kernel (exchange.cuh's peers): another's epochs would be taken for its own.

        Raises UserError.
        """
        return self._words(2, 2, self.rank.count, channels)

    def _words(self, *shape: int) -> SharedWords:
        """Zeros, when all ranks have theirs: nobody writes before. Raises UserError."""
        import torch.distributed._symmetric_memory as symmetric

        try:
            words = symmetric.empty(*shape, dtype=torch.int64, device=self.device).zero_()
            pointers = symmetric.rendezvous(words, self.group).buffer_ptrs
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the GPUs of this machine cannot read each other's memory: {reason}") from None
        torch.cuda.synchronize(self.device)
        dist.barrier()
        return SharedWords(words, torch.tensor(pointers, device=self.device))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x [..., C], of their dtype."""
        rows = x.numel() // x.shape[-1]
        if self.exchange is not None and rows <= MAX_ROWS:
            return self.sum_of_partials(x.reshape(1, rows, -1), x.dtype, None, None).view(x.shape)
        from torch.distributed import _functional_collectives as collectives  # 19 ms, which one device need not wait

        return collectives.wait_tensor(collectives.all_reduce(x, "sum", self.group))

    def sum_of_partials(
        self, partials: Tensor, dtype: torch.dtype, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        """See exchange_partials.py: of the partial sums [splits, B, N] of all ranks; bias is this rank's share."""
        from teal.kernels.exchange_partials import exchange_partials

        found = self.exchange
        assert found is not None, "CPUs share no memory"
        memory = found.words, found.epochs, found.peers, self.rank.index
        return exchange_partials(partials.contiguous(), dtype, bias, residual, *memory)

    def total(self, counts: Tensor) -> Tensor:
        """The sum of all ranks' counts, where all of them ask for it; else this rank's."""
        if not self.in_step:
            return counts
        found = counts.clone()
        dist.all_reduce(found)
        return found

    def gather(self, x: Tensor) -> Tensor:
        """The x [..., n] of all ranks beside each other: [..., n ranks]."""
        rows = x.reshape(-1, x.shape[-1])
        parts = rows.new_empty(self.rank.count, *rows.shape)
        gather_into(parts.flatten(0, 1), rows.contiguous())
        return parts.transpose(0, 1).reshape(*x.shape[:-1], -1)


def join_team(count: int, device: torch.device, whole: ModelConfig | None) -> Team:
    """The ranks that share a whole model, if any: one team for all models. device: of all; each takes its own card.

    Raises UserError. What does not divide is said before they meet: a rank that leaves while others connect fails them.
    """
    found = int(os.environ.get(RANKS, "1"))
    if count != found:
        raise ParameterError(
            f"{{tensor_parallel}} {{}}: {found} process{'es run' if found > 1 else ' runs'} this program; "
            f"start it from a command line, or {count} of them by torchrun", count,
        )  # fmt: skip
    rank = Rank(int(os.environ[RANK]), count)
    if whole is not None:
        rank.check(whole)
    return _meet(rank, device)


@functools.cache
def _meet(rank: Rank, device: torch.device) -> Team:
    """Meet the other ranks, once, from the card of this one's number. Raises UserError."""
    index, count = rank.index, rank.count
    if device.type == "cuda":
        card = int(os.environ.get(LOCAL_RANK, index))
        if device.index is not None or card >= torch.cuda.device_count():
            asked = f"{{device}} {device} names one" if device.index is not None else f"rank {index} has none"
            raise ParameterError(
                f"{{tensor_parallel}} {{}} takes a card for each rank, and {asked}; this machine has "
                f"{torch.cuda.device_count()}", count,
            )  # fmt: skip
        device = torch.device("cuda", card)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _connect(BACKENDS[device.type])
    return Team(rank, device)


def _connect(backends: str) -> None:
    """Meet the other ranks. None goes on before all have met. Raises UserError if one is lost meanwhile."""
    try:
        dist.init_process_group(backends)
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        time.sleep(LOST_S)
        raise UserError(f"the processes that share the model lost each other: {str(error).splitlines()[0]}") from None


class Summed(nn.Module):
    """The end of a sublayer whose results add up over the ranks: inner of the sum."""

    def __init__(self, team: Team, inner: nn.Module) -> None:
        super().__init__()
        self.team, self.inner = team, inner

    def forward(self, y: Tensor) -> Tensor:
        """y [B, T, C], this rank's share -> inner of the whole."""
        return self.inner(self.team.sum(y))


class SharedEmbedding(nn.Module):
    """An embedding of which each rank has the rows of some tokens."""

    def __init__(self, team: Team, inner: nn.Module, rows: range) -> None:
        super().__init__()
        self.team, self.inner, self.rows = team, inner, rows

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T] -> [B, T, C] of inner's dtype, exact: only one rank adds anything but zeros."""
        own = (tokens >= self.rows.start) & (tokens < self.rows.stop)
        found = self.inner((tokens - self.rows.start).clamp(0, len(self.rows) - 1))
        return self.team.sum(torch.where(own[..., None], found, 0))


class GatheredHead(nn.Module):
    """An output head of which each rank has the rows of some tokens; all of them get all logits."""

    def __init__(self, team: Team, inner: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.team, self.inner, self.vocab_size = team, inner, vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> fp32 [..., V]."""
        return self.team.gather(self.inner(x))[..., : self.vocab_size]


def share(model: Transformer, team: Team, config: ModelConfig) -> Transformer:
    """Make a rank's part of a model of config add up and gather with the others', in place, after all replacements."""
    team.share_memory(config.hidden_size)
    for block in model.blocks:
        for end in ("attention_end", "ffn_end"):
            block.set_submodule(end, Summed(team, block.get_submodule(end)))
    model.embedding = SharedEmbedding(team, model.embedding, team.rank.vocabulary(config))  # type: ignore[assignment]
    model.lm_head = GatheredHead(team, model.lm_head, config.vocab_size)  # type: ignore[assignment]
    model.config = team.rank.config(config)
    return model


def team_of(model: nn.Module) -> Team | None:
    """Those that share model, if any."""
    head = getattr(model, "lm_head", None)
    return head.team if isinstance(head, GatheredHead) else None
