"""Triton's interpreter, without what takes three quarters of its time."""

import functools
import inspect
import math
from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.language import core
from triton.language.core import is_builtin
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken() -> None:
    """Leave out of Triton's interpreter (3.9) what does not change its results.

    Without debug, it computes for each sum of integers whether it overflows, and drops the answer.
    """
    assert not interpreter.interpreter_builder.options.debug, "overflows would be asserted"
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    name_dtype = interpreter._get_np_dtype  # makes a table for each value that it names the dtype of
    known = functools.cache(name_dtype)
    interpreter._get_np_dtype = lambda dtype: known(dtype) if type(dtype) is tl.dtype else name_dtype(dtype)
    replace_language_once()
    share_shapes()
    unwrap_quickly()


def unwrap_quickly() -> None:
    """Let what is no constexpr and no sequence, as most is that the language unwraps, be told by its type alone."""
    unwrap = core._unwrap_if_constexpr
    plain = {int, float, bool, str, type(None), tl.tensor}

    def unwrap_once(o: Any) -> Any:
        kind = type(o)
        return o if kind in plain else o.value if kind is tl.constexpr else unwrap(o)

    core._unwrap_if_constexpr = unwrap_once


def split_attention_less() -> None:
    """Give a row and key/value head 4 programs of attention, of which most still have no positions, where GPUs have 16.

    They were half the time of a fused step. tests/kernels/test_attention_kernels.py has as many as a GPU.
    """
    from teal.kernels import rope_attention

    rope_attention.MAX_SPLITS = 4


def replace_language_once() -> None:
    """Let a call of a device function find Triton's language replaced by the call of its kernel.

    For each such call the interpreter looks through all members of all parts for those left to replace.
    """
    replace_part, replace = interpreter._patch_builtin, interpreter._patch_lang
    builtins: dict[Any, list[str]] = {}  # by part of the language, from its first use, before any was replaced
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # a kernel's, and those of tl.sum and the like
    running: list[Any] = []

    def replace_builtins(part: Any, *arguments: Any) -> None:
        if part not in builtins:
            builtins[part] = [name for name, member in inspect.getmembers(part) if is_builtin(member)]
        if any(is_builtin(getattr(part, name)) for name in builtins[part][:1]):
            replace_part(part, *arguments)

    def replace_once(fn: Any) -> Any:
        if running:
            return interpreter._LangPatchScope()  # which has nothing to restore
        running.append(fn)
        scope = replace(both)
        restore = scope.restore

        def end() -> None:
            running.clear()
            restore()

        scope.restore = end
        return scope

    interpreter._patch_builtin, interpreter._patch_lang = replace_builtins, replace_once


def share_shapes() -> None:
    """Let blocks of one element type and shape share what the interpreter worked out for the first of them.

    Each of its operations makes three blocks or so, each of which checked and wrapped its shape anew.
    """
    describe = tl.block_type.__init__
    types: dict[Any, dict[str, Any]] = {}  # attributes by the element type's name and shape

    def init_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        sizes = tuple(shape.values if type(shape) is tl.tuple else shape)
        key = (element_ty.name, sizes)
        if any(type(size) is not int for size in sizes):
            describe(self, element_ty, shape)  # of constexprs, which are slow to look up
        elif key in types:
            self.__dict__.update(types[key])
        else:
            describe(self, element_ty, shape)
            types[key] = dict(self.__dict__)

    @functools.cache
    def wrapped(sizes: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
        return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))

    def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = wrapped(tuple(type.shape.values) if type.is_block() else ())

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_once(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        one, other = lhs.type, rhs.type
        same = one.is_block() and other.is_block() and one.shape.values == other.shape.values
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_once
    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tensor
