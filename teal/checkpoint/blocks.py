"""Weights of GGUF's block types in a converted folder: how its safetensors files hold them, and who reads them.

A shard has such a weight's bytes (kernels/formats/blocks.py) under the name of the tensor, and its type and shape in
the header's metadata. Whoever asks for the tensor gets the floats fp16 [N, K] that it stands for. Only a model that
runs on the integers asks for the bytes.
"""

import enum
import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from teal.errors import UserError
from teal.kernels.block_linear import block_columns, block_floats
from teal.kernels.formats.blocks import BLOCK_TYPES, Blocks, sections, size_of, unpack
from teal.kernels.formats.packing import INPUT_GROUP_COLUMNS, pack_int4
from teal.layers.block_linear import BlockEmbedding, BlockHead, BlockLinear, BlockShape
from teal.model import Transformer

RECORD, PADDING = "blocks", "padding"  # of a shard's metadata: {name: [type, K, N]}, and spaces
LINE = 64  # bytes that a processor reads at once
LARGEST = torch.finfo(torch.float16).max
GROUP_TYPES = {"Q4_0": 4, "Q8_0": 8}  # that are integers less their middle, with a scale for 32 channels: their bits
GROUP_PARTS = ("qweight", "scales", "zeros")
DTYPE_NAMES = {torch.int8: "I8", torch.int32: "I32", torch.uint8: "U8", torch.float32: "F32"}


class Form(enum.Enum):
    """What a weight in blocks is read as: floats under its name, its bytes under it, or integers and scales by group.

    GROUPS are three tensors of other names, as QuantizedLinear has them (kernels/formats/packing.py).
    """

    FLOATS = enum.auto()
    BYTES = enum.auto()
    GROUPS = enum.auto()


NO_FORMS: Mapping[str, Form] = MappingProxyType({})


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """The safetensors file at path as it is stored, memory-mapped. Raises UserError if it is truncated or corrupt."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or corrupt safetensors file ({error}); download it again") from error


class Shard:
    """An open safetensors file; forms says of weights in blocks, by name, what they are read as, if not as floats.

    Raises UserError for a damaged record.
    """

    def __init__(self, tensors: Any, path: Path, forms: Mapping[str, Form]) -> None:
        self.tensors = tensors
        record = (tensors.metadata() or {}).get(RECORD, "{}")
        try:
            self.shapes = {name: BlockShape(*shape) for name, shape in json.loads(record).items()}
            for name, shape in self.shapes.items():
                found = tensors.get_slice(name)
                if (found.get_dtype(), found.get_shape()) != ("U8", [size_of(*shape)]):
                    raise ValueError(f"{name} has other bytes than its type")
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: its record of blocks is damaged ({error}); convert the GGUF file again") from None
        self.blocks = {name for name in self.shapes if forms.get(name) != Form.BYTES}
        self.grouped = {
            name.removesuffix("weight") + part: (name, i)
            for name in self.blocks if forms.get(name) == Form.GROUPS
            for i, part in enumerate(GROUP_PARTS) if i < 2 or self.shapes[name].kind == "Q4_0"
        }  # fmt: skip

    def keys(self) -> list[str]:
        """Names of all tensors."""
        hidden = {name for name, _ in self.grouped.values()}
        return [*(name for name in self.tensors.keys() if name not in hidden), *self.grouped]  # noqa: SIM118

    def get_tensor(self, name: str) -> Tensor:
        """As safe_open's."""
        if name in self.grouped:
            weight, part = self.grouped[name]
            found = as_groups(self._weight(weight))[part]
            assert found is not None
            return found
        if name in self.blocks:
            return block_floats([self._weight(name)], torch.float16).t().contiguous()
        return self.tensors.get_tensor(name)

    def get_slice(self, name: str) -> Any:
        """As safe_open's."""
        if name in self.grouped:
            return TensorSlice(self.get_tensor(name))
        return BlockSlice(self._weight(name)) if name in self.blocks else self.tensors.get_slice(name)

    def stored(self, name: str) -> Tensor | Blocks:
        """What save_shard takes to store it again as it is."""
        return self._weight(name) if name in self.shapes else self.tensors.get_tensor(name)

    def _weight(self, name: str) -> Blocks:
        return Blocks(*self.shapes[name], self.tensors.get_tensor(name))


class TensorSlice:
    """What safe_open tells of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_dtype(self) -> str:
        """As safetensors calls it."""
        return DTYPE_NAMES[self.tensor.dtype]

    def get_shape(self) -> list[int]:
        """Of the tensor."""
        return list(self.tensor.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.tensor[rows]


class BlockSlice:
    """Rows of the floats fp16 [N, K] that a weight stands for."""

    def __init__(self, weight: Blocks) -> None:
        self.weight = weight

    def get_dtype(self) -> str:
        """As safetensors calls it."""
        return "F16"

    def get_shape(self) -> list[int]:
        """N and K."""
        return [self.weight.N, self.weight.K]

    def __getitem__(self, rows: slice) -> Tensor:
        return block_columns(self.weight, torch.arange(*rows.indices(self.weight.N))).half()


def save_shard(tensors: Mapping[str, Tensor | Blocks], path: Path) -> None:
    """A safetensors file of these. Weights in blocks begin at whole cache lines: they can be used as mapped."""
    shapes = {name: t[:3] for name, t in tensors.items() if isinstance(t, Blocks)}
    plain = {name: t.data if isinstance(t, Blocks) else t for name, t in tensors.items()}
    metadata = {"format": "pt", RECORD: json.dumps(shapes), PADDING: ""}
    save_file(plain, path, metadata=metadata)
    if shapes and (missing := -_header_bytes(path) % LINE):  # how long a header is, only the library knows
        save_file(plain, path, metadata=metadata | {PADDING: " " * missing})


def _header_bytes(path: Path) -> int:
    """Bytes of a safetensors file before its tensors: https://huggingface.co/docs/safetensors."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def map_blocks(target: Tensor, values: Tensor) -> bool:
    """Let target, if it is a BlockWeight's, be values as they lie in a mapped file, which processes share.

    Their pages are touched in order, so that a disk is read as a whole. False if target is to be filled.
    """
    is_bytes = isinstance(target, nn.Parameter) and target.dtype == values.dtype == torch.uint8
    if not is_bytes or target.device.type != "cpu" or values.shape != target.shape or values.data_ptr() % LINE:
        return False
    values[:: mmap.PAGESIZE].sum()
    target.data = values
    return True


def fits_half(weight: Blocks) -> bool:
    """Whether all floats that it stands for are finite in fp16, by their scales. NaN does not fit."""
    _, scales, minima, supers, super_minima = sections(weight)
    found = BLOCK_TYPES[weight.kind]
    most = 0.0
    for factors, of_super, largest in ((scales, supers, 1 << found.bits), (minima, super_minima, 1)):
        if factors.numel():
            nested = of_super.float().abs().max() if of_super.numel() else torch.ones(())
            most += float(factors.float().abs().max() * nested) * largest
    return most < LARGEST


def as_groups(weight: Blocks) -> tuple[Tensor, Tensor, Tensor | None]:
    """values, scales and zeros of a weight in GROUP_TYPES, with groups along the input (kernels/formats/packing.py)."""
    integers, scales, _ = unpack(weight)
    middle = weight.type.offset
    if GROUP_TYPES[weight.kind] == 8:
        return (integers.short() - middle).to(torch.int8), scales, None
    return pack_int4(integers, INPUT_GROUP_COLUMNS), scales, torch.full_like(scales, middle, dtype=torch.uint8)


def use_block_modules(model: Transformer, shapes: Mapping[str, BlockShape], prefix: Callable[[int], str]) -> None:
    """Put modules for weights in blocks in place, unset, where shapes has all parts of one by name.

    prefix: what the names of a layer's tensors begin with.
    """
    for i, block in enumerate(model.blocks):
        for p in block.projections():
            names = [f"{prefix(i)}{name}.weight" for name in p.hf_names]
            if all(name in shapes for name in names):
                linear = block.get_submodule(p.module)
                assert isinstance(linear, nn.Linear)
                block.set_submodule(p.module, BlockLinear(linear, [shapes[name] for name in names]))
    embedding = shapes.get("model.embed_tokens.weight")
    head = embedding if model.config.tie_embeddings else shapes.get("lm_head.weight")
    if embedding is not None:
        model.embedding = BlockEmbedding(embedding, model.dtype)  # type: ignore[assignment]
    if head is not None:
        model.lm_head = BlockHead(model.lm_head, [head])  # type: ignore[assignment]
