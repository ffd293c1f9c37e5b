"""Gradients of the log-likelihood at every projection of a dense model, block by block from the last one back.

Labels are drawn from the model itself. Only the inputs of all blocks are kept, in host memory. A block is computed a
second time when its turn comes, and what was noted of it is used up before the next.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teal.calibration.stages import Positions
from teal.errors import ParameterError
from teal.kernels.matmul import matmul
from teal.layers.block_linear import BlockLinear
from teal.layers.int8_cache import has_int8_cache
from teal.layers.quantized_linear import QuantizedLinear
from teal.model import Block, Projection, Transformer, capped
from teal.progress import progress
from teal.teal_layers import SparseLinear

# Tokens of a sequence that gradients flow through at once. Many short ones tell more than few long ones. From 3 of
# 2,048 tokens Qwen2.5-Coder-0.5B, rotated, had KL .557 at 60%, from 10 of 512 .508 (means over pairs of tokens).
GRADIENT_LENGTH = 512
HEAD_TOKENS = 128  # whose logits are there at once


@dataclass(slots=True)
class Samples:
    """Of one projection: inputs x and v, both [n, K], of the same tokens."""

    inputs: Tensor
    gradients: Tensor


# What forward tells of the input of a projection of a block: the block, the projection, x [1, T, K]
NoteInput = Callable[[int, Projection, Tensor], None]
# What a Probe tells on the way back: the projection, its inputs [T, K], then g [T, N] and v [T, K] of each of its names
Note = Callable[[Projection, Tensor, dict[str, Tensor], dict[str, Tensor]], None]


class Probe(nn.Module):
    """A projection module of a block that calls note on the way back, once for each call on the way there.

    Gradients also pass weights that are quantized or sparse: the products' own have none.
    """

    def __init__(self, module: nn.Module, projection: Projection, note: Note) -> None:
        super().__init__()
        self.module, self.projection, self.note = module, projection, note

    def forward(self, x: Tensor) -> Tensor:
        """As module's, x [1, T, K]."""
        return _Probed.apply(x, self)

    def weight(self) -> Tensor:
        """In floats [K, N]."""
        if isinstance(self.module, nn.Linear):
            return self.module.weight.t()
        assert isinstance(self.module, (QuantizedLinear, BlockLinear, SparseLinear))
        return self.module.dequantized()


class _Probed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, probe: Probe) -> Tensor:
        context.probe = probe
        context.save_for_backward(x)
        return probe.module(x)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None]:
        probe, [x], [gradient] = context.probe, context.saved_tensors, grads
        p = probe.projection
        parts = dict(zip(p.names, gradient[0].split(p.sizes, dim=1), strict=True))
        weights = zip(p.names, probe.weight().split(p.sizes, dim=1), strict=True)
        v = {name: matmul(parts[name], weight.t()) for name, weight in weights}
        probe.note(p, x[0], parts, v)
        return sum(v.values(), torch.zeros_like(x)), None


@contextmanager
def watched(block: Block, note: Callable[[Projection, Tensor], None]) -> Iterator[None]:
    """Within the context each projection of block tells its input before it computes."""
    handles = [
        block.get_submodule(p.module).register_forward_pre_hook(lambda _, inputs, p=p: note(p, inputs[0]))
        for p in block.projections()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def probes(block: Block, note: Note) -> Iterator[list[Probe]]:
    """Within the context every projection of block is a Probe: these."""
    found = [Probe(block.get_submodule(p.module), p, note) for p in block.projections()]
    for probe in found:
        block.set_submodule(probe.projection.module, probe)
    try:
        yield found
    finally:
        for probe in found:
            block.set_submodule(probe.projection.module, probe.module)


class BackwardPass:
    """The gradient of the log-likelihood of labels drawn from a dense model, on its way back through the blocks.

    sequences: token ids int64 [N, L], of which about so many tokens are used. Raises UserError if keys and values are
    rounded, which no gradient passes.
    """

    def __init__(self, model: Transformer, sequences: Tensor, tokens: int) -> None:
        if has_int8_cache(model):
            raise ParameterError("{method} global needs keys and values in floats to calibrate; leave {kv_cache} out")
        self.model = model
        self.pieces = pieces_of(sequences, tokens)
        self.positions = Positions(model, self.pieces.shape[1])
        self.inputs: list[list[Tensor]] = []  # [piece][block], fp32 [1, T, C]
        self.gradients: list[Tensor] = []  # [piece], where the next block to go back through ends

    @torch.no_grad()
    def forward(self, note: NoteInput = lambda *_: None) -> None:
        """Run the model on all pieces; gradients then stand behind the last block."""
        generator, model = torch.Generator().manual_seed(0), self.model
        device = model.device
        for ids in progress(self.pieces, "running the model", "sequence"):
            x, kept = model.embed(ids[None].to(device)), []
            for i, block in enumerate(model.blocks):
                kept.append(x.cpu())
                with watched(block, partial(note, i)):
                    x = block(x, *self.positions.context(i))
            self.inputs.append(kept)
            with torch.inference_mode(False), torch.enable_grad():
                x = x.clone().requires_grad_()
                normed = model.norm(x)
                parts = [_head_gradient(model, part, generator) for part in normed.detach().split(HEAD_TOKENS, dim=1)]
                self.gradients.append(torch.autograd.grad(normed, x, torch.cat(parts, dim=1))[0].cpu())

    def resume(self, layers: int, gradients: list[Tensor]) -> None:
        """Stand before block layers, with gradients as they were there."""
        self.gradients = gradients
        for kept in self.inputs:
            del kept[layers:]

    def through(self, i: int) -> None:
        """Gradients go back through block i. Blocks go from the last to the first."""
        block, device = self.model.blocks[i], self.model.device
        with torch.inference_mode(False), torch.enable_grad():
            for j, kept in enumerate(self.inputs):
                x = kept.pop().to(device, copy=True).requires_grad_()
                y = block(x, *self.positions.context(i))
                self.gradients[j] = torch.autograd.grad(y, x, self.gradients[j].to(device, copy=True))[0].cpu()

    def samples(self, i: int) -> dict[str, Samples]:
        """As through(i), with the samples of the block's projections."""
        inputs: dict[str, list[Tensor]] = defaultdict(list)
        gradients: dict[str, list[Tensor]] = defaultdict(list)

        def note(p: Projection, x: Tensor, _: dict[str, Tensor], v: dict[str, Tensor]) -> None:
            inputs[p.name].append(x)
            for name, part in v.items():
                gradients[name].append(part)

        block = self.model.blocks[i]
        found: dict[str, Samples] = {}
        with probes(block, note):
            self.through(i)
        for p in block.projections():
            x = torch.cat(inputs[p.name])
            found |= {name: Samples(x, torch.cat(gradients[name])) for name in p.names}
        return found


def pieces_of(sequences: Tensor, tokens: int) -> Tensor:
    """About so many tokens, at even spacing over sequences int64 [N, L]: [pieces, at most GRADIENT_LENGTH]."""
    length = min(GRADIENT_LENGTH, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    count = min(len(pieces), -(-tokens // length))
    return pieces[torch.linspace(0, len(pieces) - 1, count).round().long()]


def drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row by probabilities fp32 [T, V]: int64 [T, 1]. generator is a CPU's, so that devices draw alike.

    A number of the generator for each row, not for each entry: torch.multinomial took 3 s for 512 rows of 152k entries.
    """
    sums = probabilities.cumsum(-1)
    at = torch.rand(len(sums), 1, generator=generator).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True).clamp_(max=sums.shape[-1] - 1)


@torch.no_grad()
def _head_gradient(model: Transformer, normed: Tensor, generator: torch.Generator) -> Tensor:
    """Of -log p of labels drawn from p, the model's own distribution, for inputs of the output head [1, T, C].

    Logits are of the model's dtype here. On a CPU fp32 ones of bf16 weights took nine tenths of a calibration's time.
    """
    head: nn.Module = model.lm_head
    weight = head.dequantized().t() if isinstance(head, (QuantizedLinear, BlockLinear)) else model.lm_head.weight
    logits, cap = matmul(normed[0], weight.t()).float(), model.config.logit_softcap
    logits = logits if cap is None else capped(logits, cap)
    probabilities = logits.softmax(-1)
    labels = drawn(probabilities, generator)
    gradient = probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
    if cap is not None:
        gradient *= 1 - (logits / cap).square()  # the slope of the cap
    return matmul(gradient.to(weight.dtype), weight)[None].to(normed.dtype)
