"""What dropping entries of a projection's input costs the model: its divergence, estimated from gradients.

Let d be the dropped part of an input and v = W g, with g the gradient of the log-likelihood at the projection's
output. For labels drawn from the model itself, half the mean of (d . v)^2 is the KL divergence from the dense model
to second order: E[v v^T] is the Fisher information of the input (Martens 2014, section 9). Inputs and v of some
thousand tokens give that mean at every sparsity.

Gradients go back block by block. Only the inputs of all blocks are kept, in host memory. A block is computed a second
time when its turn comes, and what was noted of it is used up before the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from teal.calibration.greedy import MAX_SPARSITY
from teal.calibration.stages import BlockStages
from teal.errors import ParameterError
from teal.files import atomic_file
from teal.layers.int8_cache import has_int8_cache
from teal.layers.quantized_linear import QuantizedLinear
from teal.model import Block, Projection, Transformer
from teal.plan import projection_names
from teal.progress import progress
from teal.teal_layers import SparseLinear

QUANTILE_ENTRIES = 1 << 17  # of magnitudes, that a threshold is taken from
DROPPED_TOKENS = 1024  # of those with gradients, whose dropped entries meet the gradients of all
# Tokens of a sequence that gradients flow through at once. Many short ones tell more than few long ones. With 3
# of 2,048 tokens Qwen2.5-Coder-0.5B, rotated, has KL .216 at 50% and .557 at 60%, with 10 of 512 .204 and .508.
GRADIENT_LENGTH = 512
HEAD_TOKENS = 128  # whose logits are there at once
# Sparsities at which errors are computed; between them they count as linear.
GRID = tuple(i / 20 for i in range(round(20 * MAX_SPARSITY) + 1))


@dataclass(slots=True)
class Samples:
    """Of one projection: inputs x and v, both [n, K], of the same tokens."""

    inputs: Tensor
    gradients: Tensor

    def errors(self) -> list[float]:
        """The divergence in nats a token that each sparsity of GRID costs.

        It averages over all pairs of tokens: d of one and v of another are taken as independent.
        """
        # bf16 where the model is: six times as fast on a CPU that multiplies it, and 9 bits are enough for a mean
        dtype = torch.bfloat16 if self.inputs.dtype == torch.bfloat16 else torch.float32
        inputs = self.inputs[:: max(1, len(self.inputs) // DROPPED_TOKENS)].to(dtype)
        magnitudes, wide = inputs.abs(), self.gradients.float()
        some = magnitudes.flatten()
        ordered = some[:: max(1, len(some) // QUANTILE_ENTRIES)].sort().values
        n, K = wide.shape
        right = (wide.t() @ wide / n if n > K else wide.t()).to(dtype)
        found = []
        for sparsity in GRID:
            threshold = ordered[int(sparsity * len(ordered))] if sparsity else 0.0
            dropped = inputs.masked_fill(magnitudes >= threshold, 0.0)
            product = (dropped @ right).float()
            squares = (product * dropped).sum(1) if n > K else product.square().mean(1)
            found.append(float(squares.mean()) / 2)
        return found


class Probe(nn.Module):
    """A projection module of a block that notes inputs and v of all tokens on the way back."""

    def __init__(self, module: nn.Module, projection: Projection) -> None:
        super().__init__()
        self.module, self.projection = module, projection
        self.inputs: list[Tensor] = []
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in projection.names}

    def forward(self, x: Tensor) -> Tensor:
        """As module's, x [1, T, K]."""
        return _Probed.apply(x, self)

    def weight(self) -> Tensor:
        """In floats [K, N]."""
        if isinstance(self.module, nn.Linear):
            return self.module.weight.t()
        assert isinstance(self.module, (QuantizedLinear, SparseLinear))
        return self.module.dequantized()

    def samples(self) -> dict[str, Samples]:
        """What was noted, by projection."""
        inputs = torch.cat(self.inputs)
        return {name: Samples(inputs, torch.cat(parts)) for name, parts in self.gradients.items()}


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
        total = torch.zeros_like(x)
        probe.inputs.append(x[0])
        parts = zip(p.names, gradient.split(p.sizes, dim=-1), probe.weight().split(p.sizes, dim=1), strict=True)
        for name, part, weight in parts:
            v = part @ weight.t()
            probe.gradients[name].append(v[0])
            total += v
        return total, None


@contextmanager
def probes(block: Block) -> Iterator[list[Probe]]:
    """Within the context every projection of block is a Probe."""
    found = [Probe(block.get_submodule(p.module), p) for p in block.projections()]
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
        self.inputs: list[list[Tensor]] = []  # [piece][block], fp32 [1, T, C]
        self.gradients: list[Tensor] = []  # [piece], where the next block to go back through ends

    @torch.no_grad()
    def forward(self) -> None:
        """Run the model on all pieces; gradients then stand behind the last block."""
        generator, model = torch.Generator().manual_seed(0), self.model
        device = model.device
        for ids in progress(self.pieces, "running the model", "sequence"):
            x, kept = model.embed(ids[None].to(device)), []
            for i in range(len(model.blocks)):
                kept.append(x.cpu())
                x = BlockStages(model, i, len(ids)).forward(x)
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
                y = block(x, *BlockStages(self.model, i, x.shape[1]).context)
                self.gradients[j] = torch.autograd.grad(y, x, self.gradients[j].to(device, copy=True))[0].cpu()

    def samples(self, i: int) -> dict[str, Samples]:
        """As through(i), with the samples of the block's projections."""
        with probes(self.model.blocks[i]) as found:
            self.through(i)
            return {name: own for probe in found for name, own in probe.samples().items()}


Layer = dict[str, list[float]]  # errors at the sparsities of GRID, by projection


def error_curves(
    model: Transformer, sequences: Tensor, tokens: int, notes: Path | None = None, key: str = ""
) -> list[Layer]:
    """The errors of every projection of a dense model [layer], from about so many tokens of sequences int64 [N, L].

    What is known after each block is kept in the file notes, and a later call with the same key goes on from there.
    """
    names, layers = projection_names(model.config), len(model.blocks)
    done, gradients = _read_notes(notes, key)
    if len(done) < layers:
        backward = BackwardPass(model, sequences, tokens)
        backward.forward()
        if done:
            backward.resume(layers - len(done), gradients)
        for i in progress(range(layers - len(done))[::-1], "estimating sensitivity", "block"):
            samples = backward.samples(i)
            done.append([samples[name].errors() for name in names])
            _write_notes(notes, key, done, backward.gradients)
    return [dict(zip(names, errors, strict=True)) for errors in reversed(done)]


def _read_notes(notes: Path | None, key: str) -> tuple[list[list[list[float]]], list[Tensor]]:
    """Errors [block, from the last one on][projection][sparsity], and gradients before the last of those blocks."""
    try:
        if notes is not None and notes.exists():
            with safe_open(notes, framework="pt") as tensors:
                if (tensors.metadata() or {}).get("key") == key:
                    return tensors.get_tensor("errors").tolist(), list(tensors.get_tensor("gradients"))
    except (OSError, SafetensorError):
        pass  # damaged notes are as good as none
    return [], []


def _write_notes(notes: Path | None, key: str, done: list[list[list[float]]], gradients: list[Tensor]) -> None:
    if notes is None:
        return
    tensors = {"errors": torch.tensor(done, dtype=torch.float64), "gradients": torch.stack(gradients)}
    with atomic_file(notes) as temporary:
        save_file(tensors, temporary, {"key": key})


def pieces_of(sequences: Tensor, tokens: int) -> Tensor:
    """About so many tokens, at even spacing over sequences int64 [N, L]: [pieces, at most GRADIENT_LENGTH]."""
    length = min(GRADIENT_LENGTH, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    count = min(len(pieces), -(-tokens // length))
    return pieces[torch.linspace(0, len(pieces) - 1, count).round().long()]


@torch.no_grad()
def _head_gradient(model: Transformer, normed: Tensor, generator: torch.Generator) -> Tensor:
    """Of -log p of labels drawn from p, the model's own distribution, for inputs of the output head [1, T, C].

    Logits are of the model's dtype here. On a CPU fp32 ones of bf16 weights took nine tenths of a calibration's time.
    """
    head: nn.Module = model.lm_head
    weight = head.dequantized().t() if isinstance(head, QuantizedLinear) else model.lm_head.weight
    probabilities = (normed[0] @ weight.t()).float().softmax(-1)
    labels = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(normed.device)
    gradient = probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
    return (gradient.to(weight.dtype) @ weight)[None].to(normed.dtype)
