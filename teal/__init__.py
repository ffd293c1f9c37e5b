"""Training-free activation sparsity for decoding at batch size one: `from teal import Engine`.

Everything a program needs is named here and imported when first used; help(teal.Engine) and the like tell the rest.

    Engine            a model ready to generate: Engine.load() is the default one, engine.model its Transformer
    SamplingParams    how to pick a token
    generate_batch    several prompts through one engine, up to eight in a step
    SparsityPlan      a threshold for each projection: SparsityPlan.load(file)
    sparsify          makes a model sparse in place, by a plan
    quantize          rounds a model's weights in place; before sparsify

A mistake that the caller can mend is a teal.errors.UserError.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal import environment

if TYPE_CHECKING:
    from teal.decoding.engine import Engine
    from teal.decoding.scheduler import generate_batch
    from teal.layers.rounding import quantize
    from teal.options import SamplingParams
    from teal.plan import SparsityPlan
    from teal.teal_layers import sparsify

__version__ = "0.1.0"  # pyproject.toml takes it from here
_HOME = {  # where each name comes from; importing torch takes a second, which --help must not wait for
    "Engine": "teal.decoding.engine",
    "SamplingParams": "teal.options",
    "SparsityPlan": "teal.plan",
    "generate_batch": "teal.decoding.scheduler",
    "quantize": "teal.layers.rounding",
    "sparsify": "teal.teal_layers",
}
__all__ = ["Engine", "SamplingParams", "SparsityPlan", "generate_batch", "quantize", "sparsify"]


def __getattr__(name: str) -> Any:
    """A public name, imported now."""
    if name not in _HOME:
        raise AttributeError(f"module 'teal' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


if (Path(__file__).parent / "kernels").is_file():
    raise ImportError(
        f"{Path(__file__).parent}: links of this checkout are text files, as git leaves them on Windows without "
        "'git config core.symlinks true'; clone it anew with -c core.symlinks=true"
    )
environment.prepare_process()
