"""Triton's interpreter, without what takes a third of its time."""

import functools
import inspect
from typing import Any

import triton.language as tl
from triton.language.core import is_builtin
from triton.runtime import interpreter


def quicken() -> None:
    """Let a call of a device function skip the parts of Triton's language that the kernel's call replaced already.

    For each such call the interpreter (3.9) looks through all members of all parts for those left to replace.
    Without debug, it also computes for each sum of integers whether it overflows, and drops the answer.
    """
    assert not interpreter.interpreter_builder.options.debug, "overflows would be asserted"
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    replace = interpreter._patch_builtin
    builtins: dict[Any, list[str]] = {}  # by part of the language, from its first use, before any was replaced

    def replace_once(part: Any, *arguments: Any) -> None:
        if part not in builtins:
            builtins[part] = [name for name, member in inspect.getmembers(part) if is_builtin(member)]
        if any(is_builtin(getattr(part, name)) for name in builtins[part][:1]):
            replace(part, *arguments)

    interpreter._patch_builtin = replace_once
    name_dtype = interpreter._get_np_dtype  # makes a table for each value that it names the dtype of
    known = functools.cache(name_dtype)
    interpreter._get_np_dtype = lambda dtype: known(dtype) if type(dtype) is tl.dtype else name_dtype(dtype)
