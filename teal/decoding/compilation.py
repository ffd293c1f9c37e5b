"""torch.compile, one transformer block at a time, and CUDA graphs.

All blocks share one compiled graph, so compile time does not grow with depth, and nothing is lost at
the seams: a block ends in a matrix product whose epilogue takes the residual add, and the next one
begins with a norm that needs the whole row anyway.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from teal.model import Transformer

RECOMPILE_LIMIT = 128


class CompiledBlock(nn.Module):
    """A block compiled for two cases: one token (decode), and any number of tokens (prefill)."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.block = block
        # Lets Inductor tune the tiles of the matrix-vector products it generates at batch 1.
        options: dict[str, Any] = {"coordinate_descent_tuning": True} if device.type == "cuda" else {}
        self.run = torch.compile(block.forward, fullgraph=True, options=options)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """As Block.forward."""
        if x.shape[1] > 1:
            for tensor, dim in ((x, 1), (cos, 1), (sin, 1), (mask, 2), (positions, 1)):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        if x.device.type == "cpu":  # the cache grows with a conversation; a CUDA graph is captured anew
            for tensor, dim in ((mask, 3), (k_cache, 2), (v_cache, 2)):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return self.run(x, cos, sin, mask, positions, k_cache, v_cache)


def compile_model(model: Transformer) -> None:
    """Compile every block of model in place, and on CUDA what surrounds them; the work happens at the first calls."""
    # All blocks of all engines in a process share one compiled function: each engine, prefill and decode,
    # and each grown cache may add an entry.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    device = model.embedding.weight.device
    for i, block in enumerate(model.layers):
        prefill = getattr(block, "prefill", None)
        if isinstance(prefill, nn.Module):  # a FusedBlock: its decode step is a row of kernels already
            block.prefill = CompiledBlock(prefill, device)
        else:
            model.layers[i] = CompiledBlock(block, device)
    if device.type == "cuda":  # some 20 small kernels otherwise, 2 us each
        model.norm.forward = torch.compile(model.norm.forward, fullgraph=True)  # type: ignore[method-assign]
        eager, compiled = model.position_tensors, torch.compile(model.position_tensors, fullgraph=True)

        def position_tensors(positions: Tensor, length: int) -> tuple[Tensor, Tensor, dict[int | None, Tensor]]:
            return (compiled if positions.shape[1] == 1 else eager)(positions, length)

        model.position_tensors = position_tensors  # type: ignore[method-assign]


def capture(
    step: Callable[[], object], changed: tuple[Tensor, ...], generator: torch.Generator | None = None
) -> torch.cuda.CUDAGraph:
    """Record step as a CUDA graph; the tensors that it changed get back what they held.

    It runs once before, outside the graph, which compiles it and fills workspaces; the key and value it writes are
    those the first replay writes again.
    """
    saved, device = [t.clone() for t in changed], changed[0].device
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        step()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    for tensor, value in zip(changed, saved, strict=True):
        tensor.copy_(value)
    return graph
