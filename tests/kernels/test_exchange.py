"""Sums over ranks: the kernel of one rank beside buffers that the others would have filled."""

import pytest
import torch
from torch import Tensor

from teal.kernels.exchange_partials import exchange_partials, programs_of
from tests.conftest import assert_near
from tests.products import DEVICE

DTYPES = (torch.float32, torch.bfloat16)


def words_of(values: Tensor, epoch: int) -> Tensor:
    """As a rank writes them: int64, fp32 bits below the epoch."""
    return values.contiguous().view(torch.int32).long() & 0xFFFFFFFF | epoch << 32


class Buffers:
    """The words of all ranks, as one process sees them, and the epochs of one."""

    def __init__(self, ranks: int, rank: int, B: int, N: int, room: int) -> None:
        self.ranks, self.rank, self.values = ranks, rank, B * N
        self.words = [torch.zeros(2, ranks, room, dtype=torch.int64, device=DEVICE) for _ in range(ranks)]
        self.epochs = torch.zeros(programs_of(B, N), dtype=torch.int32, device=DEVICE)
        self.peers = torch.tensor([words.data_ptr() for words in self.words], device=DEVICE)

    def arrive(self, epoch: int, sums: list[Tensor]) -> None:
        """Let the words of all other ranks be there."""
        for other, values in enumerate(sums):
            if other != self.rank:
                self.words[self.rank][epoch % 2, other, : self.values] = words_of(values.flatten(), epoch)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.words[self.rank], self.epochs, self.peers, self.rank


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks,rank,B,N,splits", [(2, 0, 1, 48, 3), (2, 1, 3, 37, 1), (4, 2, 8, 32, 5)])
def test_sum_over_ranks(
    ranks: int, rank: int, B: int, N: int, splits: int, dtype: torch.dtype, bias: bool, residual: bool
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    buffers = Buffers(ranks, rank, B, N, room=B * N + 5)
    b = torch.randn(N, generator=generator).to(DEVICE, dtype) if bias else None
    r = torch.randn(B, N, generator=generator).to(DEVICE, dtype) if residual else None
    for epoch in (1, 2, 3):
        partials = [torch.randn(splits, B, N, generator=generator).to(DEVICE) for _ in range(ranks)]
        sums = [parts.sum(0) + (0 if b is None else b.float()) for parts in partials]
        buffers.arrive(epoch, sums)
        actual = exchange_partials(partials[rank], dtype, b, r, *buffers.arguments)
        whole = torch.stack(sums).sum(0).to(dtype).float() + (0 if r is None else r.float())
        assert actual.dtype == dtype
        assert_near(f"epoch {epoch}", actual.float(), whole, 1e-6 if dtype == torch.float32 else 4e-3)
        for other in range(ranks):
            if other != rank:
                sent = buffers.words[other][epoch % 2, rank, : B * N]
                assert (sent >> 32 == epoch).all()
                assert_near("sent", sent.int().view(torch.float32).view(B, N), sums[rank], 1e-6)
                assert not buffers.words[other][:, :rank].any() and not buffers.words[other][:, rank + 1 :].any()
    assert (buffers.epochs == 3).all()


def test_ranks_add_in_one_order() -> None:
    """So that the same bits come out everywhere: 1e8 + 1 - 1e8 depends on the order."""
    values = [1e8, 1.0, -1e8]
    found = []
    for rank in range(3):
        buffers = Buffers(3, rank, 1, 32, room=32)
        sums = [torch.full((1, 32), value, device=DEVICE) for value in values]
        buffers.arrive(1, sums)
        found.append(exchange_partials(sums[rank][None], torch.float32, None, None, *buffers.arguments))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_bad_arguments_are_refused() -> None:
    buffers = Buffers(2, 0, 1, 32, room=32)
    words, epochs, peers, _ = buffers.arguments
    parts = torch.ones(1, 1, 32, device=DEVICE)
    with pytest.raises(ValueError, match="room for 32 and 1 programs"):
        exchange_partials(torch.ones(1, 2, 32, device=DEVICE), torch.float32, None, None, words, epochs, peers, 0)
    with pytest.raises(ValueError, match=r"words is torch\.int32"):
        exchange_partials(parts, torch.float32, None, None, words.int(), epochs, peers, 0)
    with pytest.raises(ValueError, match="rank 2: expected 0 to 1"):
        exchange_partials(parts, torch.float32, None, None, words, epochs, peers, 2)
    with pytest.raises(ValueError, match="expected contiguous"):
        exchange_partials(parts[0], torch.float32, None, None, words, epochs, peers, 0)
