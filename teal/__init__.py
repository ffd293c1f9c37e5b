"""Training-free activation sparsity for decoding at batch size one: `from teal import Engine`.

Everything a program needs is named here and imported when first used; each room's own page says what it is for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from teal import environment

if TYPE_CHECKING:
    from teal.decoding.engine import Engine
    from teal.decoding.scheduler import generate_batch
    from teal.options import SamplingParams
    from teal.plan import SparsityPlan
    from teal.quantization.rounding import quantize
    from teal.teal_layers import sparsify

__version__ = "0.1.0"  # pyproject.toml takes it from here
_HOME = {  # where each name comes from; importing torch takes a second, which --help must not wait for
    "Engine": "teal.decoding.engine",
    "SamplingParams": "teal.options",
    "SparsityPlan": "teal.plan",
    "generate_batch": "teal.decoding.scheduler",
    "quantize": "teal.quantization.rounding",
    "sparsify": "teal.teal_layers",
}
__all__ = ["Engine", "SamplingParams", "SparsityPlan", "generate_batch", "quantize", "sparsify"]


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in _HOME:
        raise AttributeError(f"module 'teal' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


environment.prepare_process()
