"""The safetensors files of a folder, seen under the names and in the form in which model.py holds its weights.

Some families name norms otherwise, or store several projections in one tensor. Norms may lack an offset, heads may
have another order of channels, weights may lack a constant factor or be 8-bit floats. All of it is changed as it is
read. Folders that this program writes hold tensors in model.py's form, and say so in their config.json.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from teal.checkpoint.blocks import NO_FORMS, Form, Shard
from teal.checkpoint.config import described, load_config, read_json
from teal.checkpoint.families import Family
from teal.errors import UserError
from teal.layers.block_linear import BlockShape
from teal.model import ModelConfig

PLAIN = "teal_layout"  # the field of config.json that says that tensors are as model.py holds them
WRAPPER = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")
NOT_TEXT = re.compile(r"^(?:model\.)?(?:vision_tower|multi_modal_projector|vision_model|audio_tower)\.")
LAYER = re.compile(r"^(model\.layers\.\d+\.)(.+)\.(\w+)$")
FP8 = "F8_E4M3"
SCALE, ACTIVATION_SCALE = "_scale_inv", "activation_scale"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a tensor of model.py comes from: some rows, or all, of a stored one, then changed."""

    stored: str
    rows: slice | None = None
    total: int = 0  # rows that the stored one must have, where these are some of them
    factor: float = 1.0
    offset: float = 0.0
    order: tuple[int, ...] = ()  # of the rows of each head

    @property
    def is_whole(self) -> bool:
        """Whether the stored tensor is this one as it stands."""
        return self == Source(self.stored)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a folder stores the model that config describes."""

    family: Family
    config: ModelConfig
    factors: dict[str, float] = field(default_factory=dict)
    is_multimodal: bool = False
    fp8_block: tuple[int, int] | None = None  # of weights that share a scale, of a folder in 8-bit floats

    def sources(self, stored: str) -> dict[str, Source]:
        """The tensors of model.py that a stored one holds; none for what is no part of it."""
        if self.is_multimodal and NOT_TEXT.match(stored):
            return {}
        if self.fp8_block and stored.endswith((SCALE, ACTIVATION_SCALE)):
            return {}
        name = self._plain_name(stored)
        match = LAYER.match(name)
        if match is None:
            return {name: self._source(stored, name.rpartition(".")[0])}
        prefix, module, part = match.groups()
        fused = self.family.fused.get(module)
        if fused is None:
            module = self.family.norms.get(module, module)
            return {f"{prefix}{module}.{part}": self._source(stored, module)}
        sizes = self._sizes(fused)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return {
            f"{prefix}{own}.{part}": self._source(stored, own, slice(start, start + size), sum(sizes))
            for own, start, size in zip(fused, starts, sizes, strict=True)
        }

    def _plain_name(self, stored: str) -> str:
        if not self.is_multimodal:
            return stored
        inner = WRAPPER.sub("", stored)
        return inner if inner == stored or inner.startswith("lm_head.") else f"model.{inner}"

    def _sizes(self, fused: tuple[str, ...]) -> list[int]:
        sizes = {n: size for p in self.config.projections() for n, size in zip(p.hf_names, p.sizes, strict=True)}
        return [sizes[name] for name in fused]

    def _source(self, stored: str, module: str, rows: slice | None = None, total: int = 0) -> Source:
        turns = module in self.config.projections()[0].hf_names[:2]  # q and k
        order = self._head_order() if turns else ()
        offset = self.family.norm_offset if module.endswith("norm") else 0.0
        return Source(stored, rows, total, self.factors.get(module, 1.0), offset, order)

    def _head_order(self) -> tuple[int, ...]:
        """For each channel of a head in model.py, in which pairs are half a head apart, the stored one."""
        D = self.config.head_dim
        turned = D if self.config.rotary_dim is None else self.config.rotary_dim
        if turned == D and not self.family.interleaved:
            return ()
        places = list(range(turned))
        first, second = (places[::2], places[1::2]) if self.family.interleaved else (
            places[: turned // 2], places[turned // 2 :]
        )  # fmt: skip
        still = (D - turned) // 2
        return (*first, *range(turned, turned + still), *second, *range(turned + still, D))

    def changes_projections(self) -> bool:
        """Whether weights of projections are stored in another form than model.py's, not only under other names."""
        projections = {name for p in self.config.projections() for name in p.hf_names}
        scaled = any(name in projections and factor != 1 for name, factor in self.factors.items())
        return bool(self.family.fused) or bool(self._head_order()) or scaled


def read_layout(folder: Path) -> Layout | None:
    """How folder stores its model; None if tensors are as model.py holds them. Raises UserError as load_config does."""
    path = folder / "config.json"
    if not path.exists() or (whole := read_json(path)).get(PLAIN):
        return None
    raw, family, _ = described(path, whole)
    config = load_config(folder)
    factors = family.factors(raw, config.head_dim)
    factors = {name: factor for name, factor in factors.items() if factor != 1}
    layout = Layout(family, config, factors, "text_config" in whole, _fp8_block(path, whole))
    is_plain = not (factors or family.norms or family.norm_offset or layout.changes_projections())
    return None if is_plain and not layout.fp8_block and not layout.is_multimodal else layout


def _fp8_block(path: Path, whole: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the weights that share a scale; None of a folder that is not in 8-bit floats."""
    scheme = whole.get("quantization_config")
    if not isinstance(scheme, dict) or scheme.get("quant_method") != "fp8":
        return None
    block = scheme.get("weight_block_size") or [128, 128]
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise UserError(f"{path}: weight_block_size {block!r:.80} is not usable; expected two positive numbers")
    return block[0], block[1]


def plain_description(folder: Path) -> dict[str, Any]:
    """The config.json of a folder with folder's model whose tensors are as model.py holds them."""
    whole = read_json(folder / "config.json")
    if read_layout(folder) is None:
        return whole
    scheme = whole.get("quantization_config")
    if isinstance(scheme, dict) and scheme.get("quant_method") == "fp8":
        del whole["quantization_config"]
    return whole | {PLAIN: 1}


class Slice:
    """As a slice of safetensors, of a tensor in model.py's form."""

    def __init__(self, view: "ShardView", name: str) -> None:
        self.view, self.name = view, name

    def get_shape(self) -> list[int]:
        """Its sizes; those of the stored tensor, if that has other rows than the parts that it should hold."""
        source = self.view.found[self.name]
        shape = list(self.view.file.get_slice(source.stored).get_shape())
        if source.rows is not None and shape and shape[0] == source.total:
            shape[0] = source.rows.stop - source.rows.start
        return shape

    def get_dtype(self) -> str:
        """As safetensors names it; what an offset or a factor changes is read in fp32, 8-bit floats in bf16."""
        stored = self.view.file.get_slice(self.view.found[self.name].stored).get_dtype()
        return "F32" if self.view.is_widened(self.name) else "BF16" if stored == FP8 else stored

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.get_shape()[0])
        return self.view.rows(self.name, start, stop)


class ShardView:
    """An open file, read as layout says; with the interface of safetensors."""

    def __init__(self, path: Path, file: Shard, layout: Layout) -> None:
        self.path, self.file, self.layout = path, file, layout
        self.stored = set(file.keys())
        self.found = {name: source for key in file.keys() for name, source in layout.sources(key).items()}  # noqa: SIM118

    @property
    def shapes(self) -> dict[str, BlockShape]:
        """Of the weights in blocks that model.py's tensors are, whole and unchanged."""
        held = {name: self.file.shapes.get(source.stored) for name, source in self.found.items() if source.is_whole}
        return {name: shape for name, shape in held.items() if shape is not None}

    def keys(self) -> list[str]:
        """Names of model.py's tensors."""
        return list(self.found)

    def get_slice(self, name: str) -> Slice:
        """Shape and dtype without the values."""
        return Slice(self, name)

    def is_widened(self, name: str) -> bool:
        """Whether a tensor is no longer exact in the dtype it is stored in: a power of two changes no digit."""
        source = self.found[name]
        return source.offset != 0 or math.frexp(source.factor)[0] != 0.5

    def get_tensor(self, name: str) -> Tensor:
        """In model.py's form, in the dtype that get_dtype tells."""
        shape = self.get_slice(name).get_shape()
        return self.rows(name, 0, shape[0]) if shape else self.file.get_tensor(self.found[name].stored)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of what get_tensor gives; no others are read."""
        source = self.found[name]
        first = 0 if source.rows is None else source.rows.start
        if source.order:
            D = self.layout.config.head_dim
            places = torch.tensor([first + i // D * D + source.order[i % D] for i in range(start, stop)])
            least = int(places.min())
            tensor = self._stored(source.stored, least, int(places.max()) + 1)[places - least]
        else:
            tensor = self._stored(source.stored, first + start, first + stop)
        if not source.offset and source.factor == 1:
            return tensor
        dtype = torch.float32 if self.is_widened(name) else tensor.dtype
        return ((tensor.float() + source.offset) * source.factor).to(dtype)

    def _stored(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a stored tensor; of one in 8-bit floats, times the scales of their blocks, in bf16."""
        stored = self.file.get_slice(name)
        if stored.get_dtype() != FP8:
            return stored[start:stop]
        scale = self.file.get_tensor(name + SCALE) if name + SCALE in self.stored else self._elsewhere(name + SCALE)
        scale = scale.float()
        if scale.dim() == 2 and scale.numel() > 1:
            assert self.layout.fp8_block is not None
            rows, columns = self.layout.fp8_block
            spread = scale.repeat_interleave(columns, 1)[:, : stored.get_shape()[1]]
            scale = spread.repeat_interleave(rows, 0)[start:stop]
        return (stored[start:stop].float() * scale).to(torch.bfloat16)

    def _elsewhere(self, name: str) -> Tensor:
        """A tensor of another file of the folder."""
        for path in sorted(self.path.parent.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 - safe_open is no dict
                    return file.get_tensor(name)
        raise UserError(f"{self.path}: {name} is in no file of the folder; download it again")


@contextmanager
def open_shard(path: Path, forms: Mapping[str, Form] = NO_FORMS) -> Iterator["Shard | ShardView"]:
    """The open safetensors file at path, memory-mapped. forms: as of Shard, by the names of model.py's tensors.

    Raises UserError if it is truncated or corrupt.
    """
    layout = read_layout(path.parent)
    try:
        with safe_open(path, framework="pt") as tensors:
            if layout is None:
                yield Shard(tensors, path, forms)
                return
            sources = {name: s for key in tensors.keys() for name, s in layout.sources(key).items()}  # noqa: SIM118
            own = {sources[name].stored: form for name, form in forms.items() if name in sources}
            yield ShardView(path, Shard(tensors, path, own), layout)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or corrupt safetensors file ({error}); download it again") from error
