"""Weight quantization: rounding to nearest, and the module that replaces nn.Linear from outside.

int8 is symmetric, int4 has a zero point; both have a scale for each group of weights (kernels/formats/packing.py).
Groups lie along the output dimension, within an input channel: activation sparsity skips scales with their weights, and
an outlier channel keeps to itself. AdaDim (ICLR 2024, arXiv 2309.15531) groups this way too.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from teal.errors import ParameterError, UserError
from teal.kernels.formats.packing import (
    GROUP_SIZES,
    INPUT_GROUP_COLUMNS,
    NIBBLES,
    check_refined,
    dequantize,
    pack_int4,
    unpack_int4,
)
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.sparse_linear import sparse_linear
from teal.layers.phase import Phase, PhasedModule
from teal.model import ModelConfig, Transformer
from teal.options import MAX_ROWS
from teal.user_text import is_number

QUANT_METHOD = "teal"
VERSIONS = {"int8": 1, "int4": 1, "mixed": 2}  # of quantization_config, by mode
EMBEDDING_VERSION = 3  # of one whose embedding is rounded, whatever the mode
HEAD_VERSION = 4  # of one whose head has 4 bits by another mode than mixed, whatever the embedding
BITS = {"int8": 8, "int4": 4, "mixed": 4}  # of a stored value; refined channels have two rows of 4
MIXED_FIELDS = ("average_bits", "refined", "refined_head")  # of QuantConfig, which other modes leave alone
GROUPINGS = ("output", "input")
Packed = tuple[Tensor, Tensor, Tensor | None]  # values, scales and zeros of a weight (kernels/formats/packing.py)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How a checkpoint's projections are quantized.

    lm_head: whether the head is too, in head_bits with groups along the output. grouping: the dimension along which the
    groups of all others lie. embedding: whether it is in 8 bits, with groups along a token's vector.

    Mode "mixed" is of 4 bits with refined channels (kernels/formats/packing.py). average_bits: what a weight has on
    average, at most. refined: how many channels each module of each layer refines. refined_head: how many the head
    does, if head_bits is 4.
    """

    mode: str
    group_size: int
    lm_head: bool = False
    grouping: str = "output"
    embedding: bool = False
    average_bits: float | None = None
    head_bits: int = 8
    refined: tuple[tuple[int, ...], ...] = ()
    refined_head: int = 0

    def __post_init__(self) -> None:
        if self.mode not in BITS:
            raise UserError(f"quantization mode {self.mode!r} is unknown; expected one of {', '.join(BITS)}")
        if self.group_size not in GROUP_SIZES:
            raise UserError(f"group size {self.group_size} is not usable; expected one of {GROUP_SIZES}")
        if self.grouping not in GROUPINGS:
            raise UserError(f"grouping {self.grouping!r} is unknown; expected one of {', '.join(GROUPINGS)}")
        if not isinstance(self.embedding, bool):
            raise UserError(f"embedding {self.embedding!r:.200} is not usable; expected true or false")
        if self.head_bits not in (4, 8):
            raise UserError(f"head_bits {self.head_bits!r:.200} is not usable; expected 4 or 8")
        if self.is_mixed:
            self._check_mixed()
        elif (self.average_bits, self.refined, self.refined_head) != (None, (), 0):
            raise UserError(f"mode {self.mode} has no refined channels; expected mode mixed")
        elif self.head_bits == 4 and not self.lm_head:
            raise UserError("head_bits is 4; expected 8 for a head that is not rounded")

    def _check_mixed(self) -> None:
        if self.by_input:
            raise ParameterError("{mode} mixed needs groups along the output; leave {grouping} {} out", self.grouping)
        bits = self.average_bits
        if bits is None or not is_number(bits) or not 4 <= bits <= 8:
            raise ParameterError("{bits} {} is out of range; expected 4 <= bits <= 8", bits)
        layers = self.refined
        if not isinstance(layers, (list, tuple)) or not all(isinstance(counts, (list, tuple)) for counts in layers):
            raise UserError(f"refined {layers!r:.200} is not usable; expected a list of counts for each layer")
        for count in (*chain(*layers), self.refined_head):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise UserError(f"refined channels {count!r:.200} are not usable; expected a whole number from 0 on")
        if self.refined_head and not self.has_int4_head:
            raise UserError(f"refined_head is {self.refined_head}; expected 0 for a head that is not of 4 bits")
        object.__setattr__(self, "refined", tuple(map(tuple, layers)))

    def check_fits(self, config: ModelConfig) -> None:
        """Raise UserError unless this architecture has the modules, channels and whole groups that are named."""
        self.check_embedding(config)
        pick_group_size(config, self.group_size, self.lm_head)
        if not self.is_mixed:
            return
        projections = config.projections()
        if [len(counts) for counts in self.refined] != [len(projections)] * config.num_layers:
            raise UserError(f"refined: expected {len(projections)} counts for each of {config.num_layers} layers")
        for i, counts in enumerate(self.refined):
            for p, count in zip(projections, counts, strict=True):
                if count > p.in_features:
                    raise UserError(f"refined: layer {i} {p.name} has {count}; expected at most {p.in_features}")
        if self.refined_head > config.hidden_size:
            raise UserError(f"refined_head is {self.refined_head}; expected at most {config.hidden_size}")

    def check_embedding(self, config: ModelConfig) -> None:
        """Raise UserError for a rounded embedding whose head would keep the same weight in floats."""
        if self.embedding and config.tie_embeddings and not self.lm_head:
            raise ParameterError(
                "{embedding} int8: this model's head is the same weight; round it too, by {quant_lm_head} int8"
            )

    @property
    def is_mixed(self) -> bool:
        return self.mode == "mixed"

    @property
    def has_int4_head(self) -> bool:
        return self.lm_head and self.head_bits == 4

    @property
    def bits(self) -> int:
        return BITS[self.mode]

    @property
    def by_input(self) -> bool:
        return self.grouping == "input"

    @property
    def version(self) -> int:
        """Of quantization_config: readers that know less refuse it."""
        if self.has_int4_head and not self.is_mixed:
            return HEAD_VERSION
        return EMBEDDING_VERSION if self.embedding else VERSIONS[self.mode]

    def as_json(self) -> dict[str, Any]:
        """What config.json keeps under quantization_config."""
        fields = {name: value for name, value in asdict(self).items() if self.is_mixed or name not in MIXED_FIELDS}
        if self.is_mixed:
            fields["refined"] = [list(counts) for counts in self.refined]  # what a file gives back
        elif self.head_bits == 8:
            del fields["head_bits"]
        if not self.embedding:
            del fields["embedding"]
        return {"quant_method": QUANT_METHOD, "version": self.version, **fields}

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> "QuantConfig":
        """The inverse of as_json. Raises UserError, naming where, for another method, version or value."""
        if raw.get("quant_method") != QUANT_METHOD:
            found = raw.get("quant_method")
            raise UserError(
                f"{where}: quantization_config quant_method {found!r} is not supported; expected teal, awq or gptq"
            )
        version, known = raw.get("version"), sorted({*VERSIONS.values(), EMBEDDING_VERSION, HEAD_VERSION})
        if version not in known:
            expected = " and ".join(map(str, known))
            raise UserError(f"{where}: quantization version {version!r:.200}; this code reads {expected}")
        fields = {name: raw[name] for name in cls.__slots__ if name in raw}
        try:
            config = cls(**fields)
        except (TypeError, UserError) as error:
            raise UserError(f"{where}: quantization_config: {error}") from None
        if version != config.version:
            raise UserError(f"{where}: mode {config.mode} has version {version}; expected {config.version}")
        return config


def pick_group_size(config: ModelConfig, asked: int | None, lm_head: bool = False) -> int:
    """The group size asked for, or the largest usable one. Raises UserError, saying which divide, if it does not.

    lm_head: whether the head is quantized, too.
    """
    widths: dict[str, int] = {}
    for p in config.projections():
        for width, parts in groupby(zip(p.names, p.sizes, strict=True), key=itemgetter(1)):
            widths[" and ".join(name for name, _ in parts)] = width
        widths[f"{p.name} input"] = p.in_features
    if lm_head:
        widths["vocabulary ({quant_lm_head})"] = config.vocab_size
    usable = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths.values())]
    size = asked or (usable[0] if usable else GROUP_SIZES[-1])
    if size in usable:
        return size
    odd = next((f"the {name} width {width}" for name, width in widths.items() if width % size), "the packed layout")
    others = f"expected one of {', '.join(map(str, usable))}" if usable else "no group size divides all of its widths"
    raise ParameterError(f"{{group_size}} {size} does not fit {odd} of this model; {others}")


def round_to_nearest(weight: Tensor, bits: int, group_size: int) -> Packed:
    """weight [K, N] -> values, scales (of its dtype), zeros, as kernels/formats/packing.py lays them out.

    Scales are rounded to weight's dtype before values are, so that rounding them costs nothing more.
    """
    K, N = weight.shape
    groups = weight.float().view(K, N // group_size, group_size)
    scales, zeros = group_scales(groups, bits, weight.dtype)
    return pack(round_groups(groups, scales, zeros, bits).view(K, N), scales, zeros, bits)


def round_in_two_terms(weight: Tensor, refined: Tensor, group_size: int) -> Packed:
    """weight [K, N] -> values, scales, zeros of K + E rows, for the refined channels int [E] in rising order.

    A refined channel has a row of 4 bits, and one more of what rounding left of it (kernels/formats/packing.py, 5).
    """
    first = round_to_nearest(weight, 4, group_size)
    if not len(refined):
        return first
    left = weight.float() - dequantize(first[0], first[1].float(), first[2])
    rest = round_to_nearest(left[refined.long()].to(weight.dtype), 4, group_size)
    values, scales, zeros = (torch.cat(parts) for parts in zip(first, rest, strict=True))  # type: ignore[arg-type]
    return values, scales, zeros


def round_input_groups(
    weight: Tensor, bits: int, group_size: int, rounding: Callable[[Tensor, int, int], Packed] = round_to_nearest
) -> Packed:
    """As round_to_nearest, or another function like it, of weight [N, K] with groups along the input."""
    values, scales, zeros = rounding(weight, bits, group_size)
    if zeros is None:
        return values.t().contiguous(), scales.t().contiguous(), None
    return pack(unpack_int4(values, group_size).t(), scales.t().contiguous(), zeros.t().contiguous(), bits)


def pack(integers: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Packed:
    """Integers [K, N] of any dtype, with scales and zeros of either grouping -> values, scales, zeros as packed."""
    N, integers = integers.shape[1], integers.contiguous()
    if bits == 8:
        return integers.to(torch.int8), scales, None
    packed_together = INPUT_GROUP_COLUMNS if scales.shape[1] == N else N // scales.shape[1]
    return pack_int4(integers, packed_together), scales, zeros.to(torch.uint8)


def group_scales(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales in dtype and zeros fp32, both [..., G], that cover groups fp32 [..., G, group_size]."""
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = torch.maximum(-low, high) / 127 if bits == 8 else (high - low) / 15
    # Subnormal ones are used: in fp16 those of 8-bit groups within 0.0078 are below the smallest normal number, 6e-5.
    # Where a scale is 0, the group is of zeros, and any will do.
    scales = scales.to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = torch.zeros_like(low) if bits == 8 else (-low / scales.float()).round().clamp(0, 15)
    return scales, zeros


def round_groups(groups: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The integers nearest to groups [..., G, group_size], as fp32."""
    low, high = (-127, 127) if bits == 8 else (0, 15)
    return (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(low, high)


class QuantizedLinear(PhasedModule):
    """nn.Linear with weights of 8 or 4 bits in a layout of kernels/formats/packing.py.

    by_input: groups lie along the input. refined_channels: how many channels have a second row. The buffer refined,
    int32 [E], lists them; it is None if there are none. Values are unset until set_weight or loading fills them.
    The sparse kernels' thresholds and segments are one, which keeps all.
    """

    refined: Tensor | None

    def __init__(
        self, linear: nn.Linear, bits: int, group_size: int, by_input: bool = False, refined_channels: int = 0
    ) -> None:
        super().__init__()
        rows, N = linear.in_features + refined_channels, linear.out_features
        columns, dtype = (N, torch.int8) if bits == 8 else (N // NIBBLES, torch.int32)
        like = linear.weight
        self.weight = nn.Parameter(like.new_empty(rows, columns, dtype=dtype), requires_grad=False)
        groups = (rows // group_size, N) if by_input else (rows, N // group_size)
        self.scales = nn.Parameter(like.new_empty(groups), requires_grad=False)
        zeros = None if bits == 8 else nn.Parameter(self.scales.new_empty(self.scales.shape, dtype=torch.uint8), False)
        self.zeros = zeros
        self.refined = nn.Buffer(like.new_empty(refined_channels, dtype=torch.int32)) if refined_channels else None
        self.thresholds = nn.Buffer(torch.zeros(1, device=like.device), persistent=False)
        self.segments = [N]
        self.bias = linear.bias
        self.bits, self.group_size, self.out_features = bits, group_size, N

    def set_weight(
        self, values: Tensor, scales: Tensor, zeros: Tensor | None, refined: Tensor | None = None
    ) -> None:  # fmt: skip
        """Take these as the weight. Raises ValueError unless refined lists as many channels as there is room for."""
        given, room = (0 if t is None else len(t) for t in (refined, self.refined))
        if given != room:
            raise ValueError(f"{given} refined channels: expected {room}")
        if refined is not None:
            check_refined(refined, len(self.weight) - room)
        own_parts, parts = (self.weight, self.scales, self.zeros, self.refined), (values, scales, zeros, refined)
        for own, new in zip(own_parts, parts, strict=True):
            if own is not None and new is not None:
                own.copy_(new)

    def dequantized(self) -> Tensor:
        """The weight [K, N] in the scales' dtype."""
        return dequantize(self.weight, self.scales, self.zeros, self.refined)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; decode takes the kernels of the sparse product."""
        y = self._by_rows(x) if self.state.phase is Phase.DECODE else self._by_blocks(x)
        return y if self.bias is None else y + self.bias

    def _by_rows(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """For few rows: each reads the weight as it is stored."""
        rows = x.reshape(-1, x.shape[-1])
        weight = (self.scales, self.zeros, self.refined)
        y = sparse_linear(rows, self.weight, self.thresholds, self.segments, *weight, out_dtype)
        return y.view(*x.shape[:-1], -1)

    def _by_blocks(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """For many rows: a block of columns at a time becomes floats."""
        return quantized_matmul(x, self.weight, self.scales, self.zeros, self.refined, out_dtype)


class QuantizedHead(QuantizedLinear):
    """An output head with weights of 8 or 4 bits, groups along the output. Its result is fp32, as OutputHead's is.

    Prefill reads it for the last token alone, so not the phase but the number of rows decides how.
    """

    def __init__(self, head: nn.Linear, group_size: int, bits: int = 8, refined_channels: int = 0) -> None:
        super().__init__(head, bits, group_size, refined_channels=refined_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> fp32 [..., N]."""
        few = x.numel() <= MAX_ROWS * x.shape[-1]
        return self._by_rows(x, torch.float32) if few else self._by_blocks(x, torch.float32)


def use_quantized_linears(model: Transformer, config: QuantConfig, fill: bool = False) -> None:
    """Replace the projections, and the head if config says so, in place by QuantizedLinear modules.

    fill: with their weights rounded to nearest, and refined channels evenly spread; without values otherwise. The
    head's result is fp32, as OutputHead's.
    """

    def filled(module: QuantizedLinear, linear: nn.Linear, by_input: bool) -> QuantizedLinear:
        if fill and module.refined is not None:
            count = len(module.refined)
            refined = torch.arange(count, dtype=torch.int32, device=module.refined.device) * linear.in_features // count
            weight = linear.weight.t().contiguous()
            module.set_weight(*round_in_two_terms(weight, refined, config.group_size), refined)
        elif fill and by_input:
            module.set_weight(*round_input_groups(linear.weight, module.bits, config.group_size))
        elif fill:
            module.set_weight(*round_to_nearest(linear.weight.t().contiguous(), module.bits, config.group_size))
        return module

    def quantized(linear: nn.Linear) -> QuantizedLinear:
        refined_channels = next(counts, 0)
        module = QuantizedLinear(linear, config.bits, config.group_size, config.by_input, refined_channels)
        return filled(module, linear, config.by_input)

    counts = chain(*config.refined)  # in replace_projections' order
    replace_projections(model, quantized)
    if config.lm_head:
        head = QuantizedHead(model.lm_head, config.group_size, config.head_bits, config.refined_head)
        model.lm_head = filled(head, model.lm_head, by_input=False)  # type: ignore[assignment]


def use_input_groups(model: Transformer, bits: int, group_size: int) -> None:
    """As use_quantized_linears without fill, for groups of channels along the input (-1: of all channels)."""

    def quantized(linear: nn.Linear) -> QuantizedLinear:
        return QuantizedLinear(linear, bits, linear.in_features if group_size == -1 else group_size, by_input=True)

    replace_projections(model, quantized)


def replace_projections(model: Transformer, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what replacement makes of each projection of every block in its place."""
    for block in model.blocks:
        for p in block.projections():
            linear = block.get_submodule(p.module)
            assert isinstance(linear, nn.Linear)
            block.set_submodule(p.module, replacement(linear))


def is_quantized(model: Transformer) -> bool:
    """Whether the model's projections are QuantizedLinear modules, as long as it is not sparse."""
    return any(isinstance(module, QuantizedLinear) for module in model.layers.modules())
