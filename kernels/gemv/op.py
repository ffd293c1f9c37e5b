"""A torch.library op from a launcher: signature, fake and op are written once. Imports no Triton."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef

HOST_ONLY = "tile"  # a launcher's argument that its op does not take: tests and bench/tune.py choose tiles


def make_op(
    name: str, launch: Callable[..., Any], outputs: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> CustomOpDef:
    """The op teal::name of launch, with its arguments, defaults and docstring, less a tile.

    outputs returns the op's results unfilled, for torch.compile. It names those of launch's arguments that it needs.
    mutates: the arguments that launch writes to.
    """
    signature = inspect.signature(launch)
    kept = [parameter for name, parameter in signature.parameters.items() if name != HOST_ONLY]
    signature = signature.replace(parameters=kept)

    @functools.wraps(launch)
    def body(*args: Any) -> Any:
        return launch(*args)

    body.__signature__ = signature  # type: ignore[attr-defined]  # what inspect and torch.library read
    op = torch.library.custom_op(f"teal::{name}", body, mutates_args=mutates)
    needed = tuple(inspect.signature(outputs).parameters)

    @op.register_fake
    def _(*args: Any, **named: Any) -> Any:
        given = signature.bind(*args, **named)
        given.apply_defaults()
        return outputs(*(given.arguments[argument] for argument in needed))

    return op
