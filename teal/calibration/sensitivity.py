"""What dropping entries of a projection's input costs the model: its divergence, estimated from gradients.

Let d be the dropped part of an input and v = W g, with g the gradient of the log-likelihood at the projection's
output. For labels drawn from the model itself, half the mean of (d . v)^2 is the KL divergence from the dense model
to second order: E[v v^T] is the Fisher information of the input (Martens 2014, section 9). Samples of inputs and of v
give that mean at every sparsity, without a matrix of in_features squared.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from teal.calibration.greedy import MAX_SPARSITY
from teal.calibration.stages import BlockStages
from teal.errors import ParameterError
from teal.layers.int8_cache import has_int8_cache
from teal.layers.quantized_linear import QuantizedLinear
from teal.model import Projection, Transformer
from teal.progress import progress
from teal.teal_layers import SparseLinear

SAMPLES = 1024  # tokens of each projection that inputs and gradients are kept of
GRADIENT_LENGTH = 512  # tokens of a sequence that gradients flow through at once
HEAD_TOKENS = 128  # whose logits are there at once
# Sparsities at which errors are computed; between them they count as linear.
GRID = tuple(i / 40 for i in range(round(40 * MAX_SPARSITY) + 1))


@dataclass(slots=True)
class Samples:
    """Of one projection: inputs and v, both [n, K] in host memory, of the same tokens."""

    inputs: Tensor
    gradients: Tensor

    def errors(self, device: torch.device) -> list[float]:
        """The divergence in nats a token that each sparsity of GRID costs, computed on device in fp32."""
        inputs, gradients = self.inputs.to(device).float(), self.gradients.to(device).float()
        magnitudes = inputs.abs()
        ordered = magnitudes.flatten().sort().values
        found = []
        for sparsity in GRID:
            threshold = ordered[int(sparsity * len(ordered))] if sparsity else 0.0
            dropped = inputs.masked_fill(magnitudes >= threshold, 0.0)
            found.append(float((dropped @ gradients.t()).square().mean()) / 2)
        return found


class Probe(nn.Module):
    """A projection module of a block that notes inputs and v of some tokens on the way back."""

    def __init__(self, module: nn.Module, projection: Projection) -> None:
        super().__init__()
        self.module, self.projection = module, projection
        self.inputs: list[Tensor] = []
        self.gradients: dict[str, list[Tensor]] = {name: [] for name in projection.names}
        self.picked = torch.zeros(0, dtype=torch.int64)  # tokens to note

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
        probe.inputs.append(x[0, probe.picked].cpu())
        parts = zip(p.names, gradient.split(p.sizes, dim=-1), probe.weight().split(p.sizes, dim=1), strict=True)
        for name, part, weight in parts:
            v = part @ weight.t()
            probe.gradients[name].append(v[0, probe.picked].cpu())
            total += v
        return total, None


@contextmanager
def probes(model: Transformer) -> Iterator[list[list[Probe]]]:
    """Within the block every projection is a Probe [layer][projection]."""
    found = [[Probe(block.get_submodule(p.module), p) for p in block.projections()] for block in model.blocks]
    pairs = [(block, probe) for block, own in zip(model.blocks, found, strict=True) for probe in own]
    for block, probe in pairs:
        block.set_submodule(probe.projection.module, probe)
    try:
        yield found
    finally:
        for block, probe in pairs:
            block.set_submodule(probe.projection.module, probe.module)


def sample_sensitivity(model: Transformer, sequences: Tensor) -> list[dict[str, Samples]]:
    """Samples of every projection of a dense model [layer][projection], from sequences int64 [N, L] of token ids.

    Raises UserError if keys and values are rounded, which no gradient passes.
    """
    if has_int8_cache(model):
        raise ParameterError("{method} global needs keys and values in floats to calibrate; leave {kv_cache} out")
    length = min(GRADIENT_LENGTH, sequences.shape[1])
    pieces = sequences[:, : sequences.shape[1] // length * length].reshape(-1, length)
    count = min(len(pieces), -(-SAMPLES // max(1, length // 4)))  # a quarter of each piece's tokens is kept
    chosen = pieces[torch.linspace(0, len(pieces) - 1, count).round().long()]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), probes(model) as found:
        for ids in progress(list(chosen), "estimating sensitivity", "sequence"):
            picked = torch.randperm(length, generator=generator)[: max(1, length // 4)]
            for probe in itertools.chain(*found):
                probe.picked = picked
            _backward(model, ids.clone(), generator)
    return [{name: samples for probe in own for name, samples in probe.samples().items()} for own in found]


def _backward(model: Transformer, ids: Tensor, generator: torch.Generator) -> None:
    """Send the gradient of the log-likelihood of labels drawn from the model back through all blocks."""
    x = start = model.embed(ids[None].to(model.embedding.weight.device)).requires_grad_()
    for i, block in enumerate(model.blocks):
        x = block(x, *BlockStages(model, i, len(ids)).context)
    normed = model.norm(x)
    parts = [_head_gradient(model, part, generator) for part in normed.detach().split(HEAD_TOKENS, dim=1)]
    torch.autograd.backward(normed, torch.cat(parts, dim=1), inputs=[start])


@torch.no_grad()
def _head_gradient(model: Transformer, normed: Tensor, generator: torch.Generator) -> Tensor:
    """Of -log p of labels drawn from p, the model's own distribution, for inputs of the output head [1, T, C]."""
    head: nn.Module = model.lm_head
    probabilities = head(normed)[0].float().softmax(-1)  # the kernels of a head have no gradients of their own
    labels = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(normed.device)
    gradient = probabilities.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=torch.float32))
    weight = head.dequantized().t() if isinstance(head, QuantizedLinear) else model.lm_head.weight
    return (gradient.to(weight.dtype) @ weight)[None].to(normed.dtype)
