"""What vLLM's batch at hand is: a decode step, whose tokens each continue a text of their own, or something else.

A batch with a token of a prompt in it counts as prefill, as this project's own engine has it: dense.
"""

from typing import Any

from vllm.compilation import monitor
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context, is_forward_context_available


def is_decode(compilation: CompilationConfig) -> bool:
    """Whether the batch may be sparse, of whatever size.

    A graph is captured once and replayed for all batches of its kind. So where vLLM captures no graphs for decode steps
    alone, each batch that a graph is for counts as one. So does a trial run, which compiles kernels.
    """
    if not is_forward_context_available():
        return True
    context = get_forward_context()
    if context.cudagraph_runtime_mode == CUDAGraphMode.NONE:
        return longest_query(context) in (None, 1)
    if compilation.cudagraph_mode.separate_routine():
        return context.cudagraph_runtime_mode == compilation.cudagraph_mode.decode_mode()
    return True


def is_measurable(compilation: CompilationConfig) -> bool:
    """Whether the batch holds users' tokens and runs outside of graphs: counting in one would cost each replay."""
    if not is_forward_context_available():
        return False
    context = get_forward_context()
    if context.cudagraph_runtime_mode != CUDAGraphMode.NONE or longest_query(context) is None:
        return False
    return compilation.cudagraph_mode == CUDAGraphMode.NONE or not monitor.cudagraph_capturing_enabled


def longest_query(context: ForwardContext) -> int | None:
    """The most tokens that a text has in the batch; None if it is a trial run, or its attention does not say."""
    found = context.attn_metadata
    while isinstance(found, (dict, list)):  # by layer, or by part of the batch and by layer
        found = next(iter(found.values() if isinstance(found, dict) else found), None)
    longest: Any = getattr(found, "max_query_len", None)
    if longest is None and (prompts := getattr(found, "num_prefills", None)) is not None:
        return 1 if prompts == 0 else 2
    return longest
