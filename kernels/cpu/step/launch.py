"""What step.h's structs hold of a model and of a call, and the call.

A struct holds addresses. Whoever makes one keeps the tensors behind it alive, and in place.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from teal.kernels.cpu.native import native_library
from teal.kernels.formats.blocks import STRIP, Blocks, sections
from teal.kernels.formats.packing import Weight, check_quantized

STEP_ROWS = 8
SEGMENTS = 3
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INPUT_MAJOR, OUTPUT_MAJOR, INT8, INT4, BLOCKS = range(5)  # Storage
DONE, UNKNOWN_TOKEN, NO_SLOT, NO_MEMORY = range(4)  # Outcome


class BlockPart(ctypes.Structure):
    """A weight of one of GGUF's block types; see Blocks in blocks.h."""

    _fields_ = [
        ("values", c_void_p), ("K", c_int64), ("N", c_int64),
        *((name, c_int32) for name in ("bits", "offset", "group", "has_minima", "nested", "padding")),
    ]  # fmt: skip


class Matrix(ctypes.Structure):
    """A weight [K, N]; see matrix.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("values", "scales", "zeros", "refined", "bias", "thresholds")),
        *((name, c_int64) for name in ("K", "N", "E", "stride", "group", "group_channels", "segments")),
        ("segment_sizes", c_int64 * SEGMENTS), ("parts", ctypes.POINTER(BlockPart)), ("part_count", c_int64),
        ("storage", c_int32), ("padding", c_int32),
    ]  # fmt: skip


class Norm(ctypes.Structure):
    """A norm; see step.h."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class Layer(ctypes.Structure):
    """A block; see step.h."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, Norm) for name in ("attention_norm", "attention_end", "ffn_norm", "ffn_end")),
        ("q_norm", c_void_p), ("k_norm", c_void_p), ("window", c_int64), ("rotation", c_int64),
    ]  # fmt: skip


class Embedding(ctypes.Structure):
    """The vectors of tokens; see step.h."""

    _fields_ = [
        ("values", c_void_p), ("scales", c_void_p), ("blocks", ctypes.POINTER(BlockPart)), ("group", c_int64),
    ]  # fmt: skip


class Model(ctypes.Structure):
    """A model; see step.h."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)), ("embedding", Embedding), ("norm", Norm), ("rotations", c_void_p),
        ("head", Matrix),
        *((name, c_int64) for name in ("layer_count", "vocabulary", "hidden", "intermediate")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "rotation_count")),
        *((name, c_float) for name in ("eps", "attention_scale", "embedding_scale")),
        *((name, c_float) for name in ("attention_softcap", "logit_softcap")),
        *((name, c_int32) for name in ("activation", "dtype", "int8_cache", "heads_normed_together", "padding")),
    ]  # fmt: skip


class Call(ctypes.Structure):
    """A step; see step.h."""

    _fields_ = [
        ("rows", c_int64), *((name, c_void_p) for name in ("tokens", "positions", "k", "v")),
        *((f"{name}_stride", c_int64) for name in ("layer", "row", "head", "slot")), ("slots", c_int64),
        *((name, c_void_p) for name in ("hidden_in", "hidden_out", "logits")), ("choose", c_int64),
    ]  # fmt: skip


class Thresholded(NamedTuple):
    """Thresholds fp32 [J] of |x|, each of so many columns as segments say."""

    thresholds: Tensor
    segments: Sequence[int]


def gathered(weight: Weight, limits: Thresholded, bias: Tensor | None) -> Matrix:
    """The struct of a weight [K, N], thresholded. Raises ValueError for tensors that the kernel cannot read."""
    segments = list(limits.segments)
    if weight.scales is not None:
        check_quantized(weight, weight.K, segments)
    tensors = [t for t in (*weight[1:], limits.thresholds, bias) if t is not None]
    if not all(t.is_contiguous() for t in tensors) or weight.values.stride(1) != 1:
        raise ValueError("a weight is not contiguous")
    if weight.scales is not None and not weight.values.is_contiguous():
        raise ValueError("a quantized weight is not contiguous")
    matrix = Matrix(
        values=_address(weight.values), scales=_address(weight.scales), zeros=_address(weight.zeros),
        refined=_address(weight.refined), bias=_address(bias), thresholds=_address(limits.thresholds),
        K=weight.K, N=weight.N, E=0 if weight.refined is None else len(weight.refined),
        stride=weight.values.stride(0), group=weight.group_size, group_channels=weight.channels,
        storage={16: INPUT_MAJOR, 8: INT8, 4: INT4}[weight.bits],
    )  # fmt: skip
    return _with_segments(matrix, segments, limits.thresholds)


def blocked(parts: Sequence[Blocks], limits: Thresholded, bias: Tensor | None) -> Matrix:
    """The struct of a thresholded weight of parts side by side in blocks. Raises ValueError as gathered."""
    matrix = Matrix(
        bias=_address(bias), thresholds=_address(limits.thresholds), K=parts[0].K, N=sum(part.N for part in parts),
        group=STRIP, parts=(BlockPart * len(parts))(*map(block_part, parts)), part_count=len(parts), storage=BLOCKS,
    )  # fmt: skip
    if any(part.K != matrix.K for part in parts) or (bias is not None and not bias.is_contiguous()):
        raise ValueError("parts of a weight differ in channels, or a bias is not contiguous")
    return _with_segments(matrix, list(limits.segments), limits.thresholds)


def block_part(weight: Blocks) -> BlockPart:
    """The struct of such a weight. Raises ValueError for bytes of another size."""
    sections(weight)
    found = weight.type
    return BlockPart(
        values=_address(weight.data), K=weight.K, N=weight.N, bits=found.bits, offset=found.offset, group=found.group,
        has_minima=found.has_minima, nested=found.nested,
    )  # fmt: skip


def _with_segments(matrix: Matrix, segments: list[int], thresholds: Tensor) -> Matrix:
    if len(segments) > SEGMENTS or len(thresholds) != len(segments) or sum(segments) != matrix.N:
        raise ValueError(f"segments {segments} do not cover {matrix.N} columns")
    matrix.segments = len(segments)
    matrix.segment_sizes[: len(segments)] = segments
    return matrix


def dotted(weight: Tensor, bias: Tensor | None) -> Matrix:
    """The struct of a dense weight in floats [N, K]. Raises ValueError as gathered does."""
    if weight.stride(1) != 1 or (bias is not None and not bias.is_contiguous()):
        raise ValueError("a weight is not contiguous")
    N, K = weight.shape
    return Matrix(
        values=_address(weight), bias=_address(bias), K=K, N=N, stride=weight.stride(0), group=1, storage=OUTPUT_MAJOR
    )


def embedded(weight: Tensor | Blocks, scales: Tensor | None = None) -> Embedding:
    """The struct of an embedding: floats [V, C], int8 with scales [V, groups], or blocks [C, V].

    Raises ValueError as gathered does.
    """
    if isinstance(weight, Blocks):
        return Embedding(blocks=ctypes.pointer(block_part(weight)))
    if not weight.is_contiguous() or (scales is not None and not scales.is_contiguous()):
        raise ValueError("an embedding is not contiguous")
    group = 1 if scales is None else weight.shape[1] // scales.shape[1]
    return Embedding(values=_address(weight), scales=_address(scales), group=group)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class StepProgram:
    """The compiled step. Raises ValueError if it is not there, or lays structs out otherwise."""

    def __init__(self) -> None:
        library = native_library()
        if library is None:
            raise ValueError("there are no compiled kernels")
        sizes = (c_int64 * 5)()
        library.teal_cpu_struct_sizes(sizes)
        expected = [ctypes.sizeof(struct) for struct in (Matrix, Layer, Model, Call, BlockPart)]
        if list(sizes) != expected:
            raise ValueError(f"its structs have {list(sizes)} bytes: expected {expected}")
        self.step = library.teal_cpu_step
        self.step.argtypes = (ctypes.POINTER(Model), ctypes.POINTER(Call), c_int64)
        self.step.restype = c_int32

    def run(self, model: Model, call: Call, threads: int) -> None:
        """Run a step. Raises ValueError for a token or position that there is not, MemoryError."""
        outcome = self.step(model, call, threads)
        if outcome == UNKNOWN_TOKEN:
            raise ValueError(f"a token is out of range; expected 0 to {model.vocabulary - 1}")
        if outcome == NO_SLOT:
            raise ValueError(f"a position is out of range; expected 0 to {call.slots - 1}")
        if outcome == NO_MEMORY:
            raise MemoryError("no memory is left for a decode step")
