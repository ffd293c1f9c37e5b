"""torch.compile, one transformer block at a time, and CUDA graphs.

All blocks share one compiled graph, so compile time does not grow with depth. Nothing is lost at the seams: a block
ends in a matrix product whose epilogue takes the residual add. The next one begins with a norm that needs the whole row
anyway.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teal.layers.phase import Phase
from teal.model import Block

RECOMPILE_LIMIT = 128


def run_block(
    block: Block, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """The function that is compiled: block's forward."""
    return block(x, cos, sin, mask, positions, k_cache, v_cache)


def compile_blocks(device: torch.device) -> Callable[..., Tensor]:
    """run_block for torch.compile, which compiles at the first calls: once for decode, once for prefill."""
    # All blocks of all models in a process share one compiled function. Each model, prefill and decode, and each grown
    # cache may add an entry.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    # Lets Inductor tune the tiles of the matrix-vector products it generates at batch 1.
    options: dict[str, Any] = {"coordinate_descent_tuning": True} if device.type == "cuda" else {}
    return torch.compile(run_block, fullgraph=True, options=options)


def mark_varying(
    phase: Phase, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> None:
    """Tell torch.compile which sizes of run_block's arguments differ between calls of a phase."""
    if phase is Phase.PREFILL:
        for tensor, dim in ((x, 1), (cos, 1), (sin, 1), (mask, 2), (positions, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
    if x.device.type == "cpu":  # the cache grows with a conversation; a CUDA graph is captured anew
        for tensor, dim in ((mask, 3), (k_cache, 2), (v_cache, 2)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def capture(
    step: Callable[[], object], changed: tuple[Tensor, ...], generator: torch.Generator | None = None
) -> torch.cuda.CUDAGraph:
    """Record step as a CUDA graph; the tensors that it changed get back what they held.

    It runs once before, outside the graph, which compiles it and fills workspaces. The key and value it writes are
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
