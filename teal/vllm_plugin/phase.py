"""What vLLM's batch at hand is: a decode step, whose tokens each continue a text of their own, or something else.

A batch with a token of a prompt in it counts as prefill, as this project's own engine has it: dense.
"""

from typing import Any

from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context, is_forward_context_available

USERS_PROMPT = 16  # tokens; vLLM 0.25 warms its kernels up with prompts of 2 tokens, and of a few more if it speculates


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


def is_measurable(compilation: CompilationConfig, tokens: int) -> bool:
    """Whether a batch of so many tokens has a user's prompt in it, and runs outside of graphs, which cannot count.

    What vLLM runs for trial is no longer than its largest graph, or has prompts of a few tokens, or none at all.
    """
    if not is_forward_context_available():
        return False
    context, graphs = get_forward_context(), compilation.cudagraph_mode != CUDAGraphMode.NONE
    if context.cudagraph_runtime_mode != CUDAGraphMode.NONE:
        return False
    largest = (compilation.max_cudagraph_capture_size or 0) if graphs else 0
    return tokens > largest and (longest_query(context) or 0) >= USERS_PROMPT


def longest_query(context: ForwardContext) -> int | None:
    """The most tokens that a text has in the batch; None if it is a trial run, or its attention does not say."""
    found = context.attn_metadata
    while isinstance(found, (dict, list)):  # by layer, or by part of the batch and by layer
        found = next(iter(found.values() if isinstance(found, dict) else found), None)
    longest: Any = getattr(found, "max_query_len", None)
    if longest is None and (prompts := getattr(found, "num_prefills", None)) is not None:
        return 1 if prompts == 0 else USERS_PROMPT
    return longest
