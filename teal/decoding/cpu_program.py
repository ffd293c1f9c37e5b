"""A decode step of up to 8 rows as one native call on a CPU (kernels/cpu/step); all else by the modules.

The program reads the modules' own tensors, rounds where they round, and sums in fp32. In fp32 its logits are the eager
backend's to 1e-5; in bf16 and fp16 roundings may fall the other way.
"""

import math

import torch
from torch import Tensor, nn

from teal.decoding.backend import FUSED_INPUTS, Backend, StepBackend
from teal.errors import UserError
from teal.extras import extras
from teal.kernels.cpu.native import native_kernels
from teal.kernels.cpu.step.launch import (
    ACTIVATIONS,
    DTYPES,
    STEP_ROWS,
    Call,
    Embedding,
    Layer,
    Matrix,
    Model,
    Norm,
    StepProgram,
    Thresholded,
    blocked,
    dotted,
    embedded,
    gathered,
)
from teal.kernels.formats.packing import Weight
from teal.layers.block_linear import BlockEmbedding, BlockHead, BlockLinear, BlockWeight
from teal.layers.int8_cache import Int8CacheAttention, has_int8_cache
from teal.layers.output_head import NativeHead
from teal.layers.quantized_embedding import QuantizedEmbedding
from teal.layers.quantized_linear import QuantizedHead, QuantizedLinear
from teal.layers.wide_linear import WideLinear
from teal.model import Attention, Block, KVCache, LayerNorm, ModelConfig, OutputHead, RMSNorm, Transformer
from teal.rope import RopeKind, angle_factors, frequencies
from teal.teal_layers import SparseLinear

ATTENTIONS = (Attention, Int8CacheAttention)
PROJECTIONS = (nn.Linear, WideLinear, SparseLinear, QuantizedLinear, BlockLinear)
HEADS = (OutputHead, NativeHead, QuantizedHead, BlockHead)
EMBEDDINGS = (nn.Embedding, QuantizedEmbedding, BlockEmbedding)

# By teal/extras.py's names; a family with anything else is refused.
COMPUTED = {
    "activation gelu_tanh", "layer norms", "sublayers without a norm before", "norms after sublayers",
    "norms of q and k over all heads", "a soft cap of attention scores", "a scaled embedding", "a soft cap of logits",
    "rotations that differ by layer", "a factor of cos and sin",
}  # fmt: skip


class CpuProgramBackend(StepBackend):
    """Decodes by one call; more rows, counted steps and prefill go to the modules.

    torch.get_num_threads says how many threads a step takes. Raises UserError, with the reason, if the program cannot
    run.
    """

    name = "program"

    def __init__(self, others: Backend) -> None:
        model = others.model
        if obstacle := program_obstacle(model):
            raise UserError(obstacle)
        super().__init__(others)
        self.keeps_modules = others.keeps_modules
        self.program = StepProgram()
        self.rotations = _rotations(model.config)
        self.cache_dtype = model.blocks[0].attention.cached_vector(model.dtype)[1]
        self.described: tuple[int, Model] | None = None
        try:
            self._model()
        except ValueError as error:  # a tensor that the program cannot read
            raise UserError(str(error)) from None

    def _decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        if not self._takes(len(tokens)):
            return self.others._decode(tokens, positions, kv_cache)
        hidden = torch.empty(len(tokens), 1, self.model.config.hidden_size)
        self._run(self._call(tokens, positions, kv_cache), hidden_out=hidden)
        return hidden

    def choose(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor | None:
        """As Backend.choose, for all rows that the program takes."""
        if not self._takes(len(tokens)):
            return None
        logits = torch.empty(len(tokens), self.model.config.vocab_size)
        self._run(self._call(tokens, positions, kv_cache), logits=logits, choose=True)
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """As Backend.logits. A few rows get the bits that choose gives them."""
        C = self.model.config.hidden_size
        rows = hidden.reshape(-1, C).contiguous()
        if not self._takes(len(rows)) or rows.dtype != torch.float32:
            return super().logits(hidden)
        logits = torch.empty(len(rows), self.model.config.vocab_size)
        self._run(Call(rows=len(rows), hidden_in=rows.data_ptr()), logits=logits)
        return logits.view(*hidden.shape[:-1], -1)

    def _takes(self, rows: int) -> bool:
        return 0 < rows <= STEP_ROWS and not self.state.counting

    def _call(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Call:
        k, v = kv_cache.k, kv_cache.v
        assert tokens.dtype == positions.dtype == torch.int64 and tokens.is_contiguous() and positions.is_contiguous()
        assert k.dtype == v.dtype == self.cache_dtype and k.stride() == v.stride() and k.stride(4) == 1
        assert k.shape[1] == len(tokens) and k.shape[0] == self.model.config.num_layers
        layer, row, head, slot = (size * k.element_size() for size in k.stride()[:4])
        return Call(
            rows=len(tokens), tokens=tokens.data_ptr(), positions=positions.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
            layer_stride=layer, row_stride=row, head_stride=head, slot_stride=slot, slots=k.shape[3],
        )  # fmt: skip

    def _run(
        self, call: Call, hidden_out: Tensor | None = None, logits: Tensor | None = None, choose: bool = False
    ) -> None:
        if hidden_out is not None:
            call.hidden_out = hidden_out.data_ptr()
        if logits is not None:
            call.logits, call.choose = logits.data_ptr(), choose
        self.program.run(self._model(), call, torch.get_num_threads())

    def _model(self) -> Model:
        """The model's struct; another one when thresholds have been replaced."""
        if self.described is None or self.described[0] != self.state.replaced:
            self.described = self.state.replaced, _described(self.model, self.rotations)
        return self.described[1]


def _rotations(config: ModelConfig) -> Tensor:
    """Of each kind of rotation that config has: frequencies, and factors of cos and sin. fp32 [kinds, 2, D/2]."""
    found = []
    for kind in _rope_kinds(config):
        turned, theta, scaling = config.rope(kind)
        freqs = frequencies(config.head_dim, turned, theta, scaling, torch.device("cpu"))
        found.append(torch.stack((freqs, angle_factors(freqs, scaling))))
    return torch.stack(found)


def _rope_kinds(config: ModelConfig) -> list[RopeKind]:
    return list(dict.fromkeys(config.ropes()))


def _described(model: Transformer, rotations: Tensor) -> Model:
    c = model.config
    ropes, kinds = c.ropes(), _rope_kinds(c)
    layers = (Layer * c.num_layers)(
        *(
            _layer(block, window, kinds.index(rope))
            for block, window, rope in zip(model.blocks, c.sliding_windows, ropes, strict=True)
        )
    )
    return Model(
        layers=layers, embedding=_embedding(model.embedding), norm=_norm(model.norm), rotations=rotations.data_ptr(),
        head=_matrix(model.lm_head), layer_count=c.num_layers, vocabulary=c.vocab_size, hidden=c.hidden_size,
        intermediate=c.intermediate_size, heads=c.num_heads, kv_heads=c.num_kv_heads, head_dim=c.head_dim,
        rotation_count=len(kinds), eps=c.norm_eps, attention_scale=1 / math.sqrt(c.head_dim),
        embedding_scale=c.embedding_factor(model.dtype), attention_softcap=c.attention_softcap or 0,
        logit_softcap=c.logit_softcap or 0, activation=ACTIVATIONS[c.activation], dtype=DTYPES[model.dtype],
        int8_cache=has_int8_cache(model), heads_normed_together=c.qk_norm_full,
    )  # fmt: skip


def _layer(block: Block, window: int | None, rotation: int) -> Layer:
    ends = ("attention_norm", "attention_end", "ffn_norm", "ffn_end")
    heads = {"q_norm": block.attention.q_norm, "k_norm": block.attention.k_norm}
    return Layer(
        **{p.name: _matrix(block.get_submodule(p.module)) for p in block.projections()},
        **{name: _norm(getattr(block, name)) for name in ends},
        **{name: norm.weight.data_ptr() for name, norm in heads.items() if isinstance(norm, RMSNorm)},
        window=window or 0, rotation=rotation,
    )  # fmt: skip


def _norm(module: nn.Module) -> Norm:
    """The struct of a norm of model.py, or of what stands in its place."""
    if isinstance(module, LayerNorm):
        return Norm(weight=module.weight.data_ptr(), bias=module.bias.data_ptr())
    return Norm(weight=module.weight.data_ptr()) if isinstance(module, RMSNorm) else Norm()


def _matrix(module: nn.Module) -> Matrix:
    if isinstance(module, nn.Linear):
        return dotted(module.weight, module.bias)
    assert isinstance(module, (SparseLinear, QuantizedLinear, BlockLinear))
    limits = Thresholded(module.thresholds, module.segments)
    if isinstance(module.weight, BlockWeight):
        return blocked(module.weight.parts, limits, module.bias)
    assert isinstance(module, (SparseLinear, QuantizedLinear))
    weight = Weight(module.weight, module.scales, module.zeros, module.refined)
    return gathered(weight, limits, module.bias)


def _embedding(module: nn.Module) -> Embedding:
    if isinstance(module, BlockEmbedding):
        return embedded(module.weight.parts[0])
    assert isinstance(module, (nn.Embedding, QuantizedEmbedding))
    return embedded(module.weight, module.scales if isinstance(module, QuantizedEmbedding) else None)


def program_obstacle(model: Transformer) -> str:
    """Why the program cannot run model; empty if it can."""
    device, dtype = model.device, model.dtype
    if device.type != "cpu":
        return f"it is for a CPU, and the model is on {device.type}"
    if dtype not in DTYPES:
        return f"dtype {str(dtype).removeprefix('torch.')} is not supported; expected fp32, bf16 or fp16"
    if reason := _module_obstacle(model) or _width_obstacle(model):
        return reason
    floats = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()} - {torch.float32}
    if floats - {dtype}:
        return "parameters of several dtypes are not supported"
    return "" if native_kernels() is not None else "there are no compiled kernels"


def _module_obstacle(model: Transformer) -> str:
    """Why modules of model are not those that the program stands for."""
    inputs = tuple(p.input for p in model.config.projections())
    if inputs != FUSED_INPUTS:
        return f"a block of projections of {', '.join(inputs)} inputs is not supported"
    if features := [name for name in extras(model.config) if name not in COMPUTED]:
        return f"it does not compute {', '.join(features)}"
    for block in model.layers:
        if type(block) is not Block or type(block.attention) not in ATTENTIONS:
            return f"a block of {type(block).__name__} is not supported"
        for p in block.projections():
            if type(module := block.get_submodule(p.module)) not in PROJECTIONS:
                return f"projections of {type(module).__name__} are not supported"
    if type(model.embedding) not in EMBEDDINGS:
        return f"an embedding of {type(model.embedding).__name__} is not supported"
    if type(model.lm_head) not in HEADS:
        return f"a head of {type(model.lm_head).__name__} is not supported"
    return ""


def _width_obstacle(model: Transformer) -> str:
    """Why gate and up cannot be cut into the same blocks: packed columns of one would reach into the other."""
    for block in model.blocks:
        module = block.feed_forward.gate_up
        if isinstance(module, (SparseLinear, QuantizedLinear)) and module.scales is not None:
            group = Weight(module.weight, module.scales, module.zeros, module.refined).group_size
            if model.config.intermediate_size % group:
                return f"intermediate size {model.config.intermediate_size} is no multiple of {group} columns"
    return ""
