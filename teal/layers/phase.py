"""Which phase of a text a model is in: what its replaced modules must know beside their input.

Prefill reads many tokens and is bound by arithmetic; decode reads one token a row and is bound by memory. A prompt may
have one token and a verification several, so the phase is said, not guessed from a shape.
"""

import enum
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Phase(enum.Enum):
    """PREFILL: the tokens of a prompt, or drafted ones to verify. DECODE: the next token of each row."""

    PREFILL = enum.auto()
    DECODE = enum.auto()


class CallState:
    """What all replaced modules of one model read in a call. A call that nothing announced is a dense prefill."""

    def __init__(self) -> None:
        self.phase = Phase.PREFILL
        self.sparse_share = 0.0  # of a prefill's tokens, the last ones
        self.counting = False  # of the entries that sparse projections keep
        self.replaced = 0  # grows when a module's thresholds become other tensors or segments

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within the block calls are decode steps."""
        self.phase = Phase.DECODE
        try:
            yield
        finally:
            self.phase = Phase.PREFILL


class PhasedModule(nn.Module):
    """A module that computes otherwise in prefill than in decode."""

    def __init__(self) -> None:
        super().__init__()
        self.state = CallState()


def call_state(model: nn.Module) -> CallState:
    """The state that all phased modules of model share from now on: the first one's. A plain model gets one unread."""
    modules = [module for module in model.modules() if isinstance(module, PhasedModule)]
    state = modules[0].state if modules else CallState()
    for module in modules:
        module.state = state
    return state


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """Within the block calls of model, made without a backend, are decode steps."""
    with call_state(model).decoding():
        yield
