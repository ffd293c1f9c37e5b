"""A decode step of one row as one CUDA kernel (kernels/program); all else by the fused backend, on the same weights."""

import torch
from torch import Tensor, nn

from teal.decoding.backend import Backend, StepBackend
from teal.errors import UserError
from teal.extras import extras
from teal.kernels.formats.packing import Weight
from teal.kernels.program.compiler import compiler_obstacle
from teal.kernels.program.launch import Program, Tables, device_facts, matrix_words, tables
from teal.kernels.program.plan import plan, shape_obstacle, weight_obstacle
from teal.kernels.program.shapes import PRODUCTS, Device, Format, Model
from teal.layers.int8_cache import has_int8_cache
from teal.layers.quantized_embedding import QuantizedEmbedding
from teal.layers.quantized_linear import QuantizedHead, QuantizedLinear
from teal.layers.team import SharedEmbedding, team_of
from teal.model import KVCache, OutputHead, RMSNorm, Transformer
from teal.parallel import Rank
from teal.rope import frequencies
from teal.teal_layers import SparseLinear

NO_MATRIX = [0, 0, 0, 0, 0, 0, 1, 0]
# At whose ends program.cu takes the clocks, of a layer. A phase has in it the wait for what it needs.
PHASES = (
    "list of q,k,v", "q,k,v", "sums of q,k,v", "attention", "list of o", "o", "sums of o", "list of gate,up", "gate,up",
    "list of down, down", "sums of down",
)  # fmt: skip
Projected = SparseLinear | QuantizedLinear


class CudaProgramBackend(StepBackend):
    """Decodes a single row by one launch; more rows, counted steps and prefill go to another backend.

    The others' projections are in the layout of the sparse kernels. Raises UserError, with the reason, if the program
    cannot run.
    """

    name = "program"

    def __init__(self, others: Backend) -> None:
        model = others.model
        if obstacle := program_obstacle(model):
            raise UserError(obstacle)
        super().__init__(others)
        device = model.device
        described = _described(model)
        self.program = Program(plan(described, device_facts(device)), device)
        self.cache_dtype = torch.int8 if has_int8_cache(model) else model.dtype
        rope = model.config.rope(model.config.ropes()[0])  # of all layers: others are refused
        self.frequencies = frequencies(model.config.head_dim, *rope, device).contiguous()
        *names, head = PRODUCTS
        found = [pair for modules in _projected(model) for pair in zip(modules, names, strict=True)]
        if isinstance(model.lm_head, QuantizedHead):
            found.append((model.lm_head, head))
        self.weight_tables: dict[nn.Module, Tables] = {
            module: tables(_weight(module), name, self.program.plan, described.products[2]) for module, name in found
        }
        self.no_threshold = torch.zeros(1, device=device)
        self.team, self.first_row = team_of(model), torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.shared_words = None if self.team is None else self.team.step_words(model.config.hidden_size)
        self.stamps: Tensor | None = None  # of new_stamps, if the clocks of launches are wanted
        self.tables: dict[tuple[int, ...], Tensor] = {}  # of all layers; a captured step may need old ones

    def new_stamps(self) -> Tensor:
        """Room for a launch's clocks, int64 [layers, 1 + phases, blocks]: 0 where a block has no part in a phase."""
        layers, blocks = self.model.config.num_layers, self.program.plan.grid
        return torch.zeros(layers, 1 + len(PHASES), blocks, dtype=torch.int64, device=self.model.device)

    def _decode(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        if tokens.shape[0] > 1 or self.state.counting:
            return self.others._decode(tokens, positions, kv_cache)
        C = self.model.config.hidden_size
        hidden = torch.empty(1, 1, C, dtype=torch.float32, device=tokens.device)
        self._launch(tokens, positions, kv_cache, hidden.data_ptr(), 0, 0)
        return hidden

    def choose(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor | None:
        """As Backend.choose: for one row the head and the argmax are in the same launch, if the model is not shared."""
        if tokens.shape[0] > 1 or self.state.counting or self.team is not None:
            return None
        logits = torch.empty(1, self.model.config.vocab_size, dtype=torch.float32, device=tokens.device)
        self._launch(tokens, positions, kv_cache, 0, logits.data_ptr(), tokens.data_ptr())
        return logits

    def _launch(
        self, tokens: Tensor, positions: Tensor, kv_cache: KVCache, hidden: int, logits: int, next_token: int
    ) -> None:
        """program.cu's Arguments, and the launch."""
        assert tokens.dtype == positions.dtype == torch.int64, "tokens and positions are int64"
        model, k, v = self.model, kv_cache.k, kv_cache.v
        assert k.dtype == self.cache_dtype and k.stride() == v.stride() and k.stride(4) == 1
        rows, head, peers = self._layer_table(), NO_MATRIX, 0
        if type(model.embedding) is nn.Embedding:
            embedding, read = model.embedding.weight, tokens
        else:  # rounded, or other ranks have the rows of other tokens
            embedding, read = model.embedding(tokens), self.first_row
        if self.shared_words is None:
            head = self._matrix(model.lm_head, self.no_threshold)
        else:  # the head is computed outside
            peers = self.shared_words.peers.data_ptr()
        self.program.launch([
            rows.data_ptr(), embedding.data_ptr(), self.frequencies.data_ptr(),
            model.norm.weight.data_ptr(), *head,
            k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(2), k.stride(3),
            self.program.words.data_ptr(), self.program.counters.data_ptr(), self.program.counters[1:].data_ptr(),
            read.data_ptr(), positions.data_ptr(), hidden, logits, next_token,
            0 if self.stamps is None else self.stamps.data_ptr(), peers,
        ])  # fmt: skip

    def _layer_table(self) -> Tensor:
        """Layer of program.cu for every block, on the device; another one when a tensor has been replaced."""
        words: list[int] = []
        for block, window in zip(self.model.blocks, self.model.config.sliding_windows, strict=True):
            for p in block.projections():
                words += self._matrix(block.get_submodule(p.module))
            attention = block.attention
            norms = (block.attention_norm, block.ffn_norm, attention.q_norm, attention.k_norm)
            words += [norm.weight.data_ptr() if isinstance(norm, RMSNorm) else 0 for norm in norms]
            words.append(window or 0)
        key = tuple(words)
        if key not in self.tables:
            self.tables[key] = torch.tensor(words, device=self.frequencies.device)
        return self.tables[key]

    def _matrix(self, module: nn.Module, thresholds: Tensor | None = None) -> list[int]:
        if isinstance(module, OutputHead):
            return [module.weight.data_ptr(), *NO_MATRIX[1:]]
        assert isinstance(module, (SparseLinear, QuantizedLinear))
        limits = module.thresholds if thresholds is None else thresholds
        return matrix_words(_weight(module).values, self.weight_tables[module], limits, module.bias)


def program_obstacle(model: Transformer) -> str:
    """Why the program cannot run model; empty if nothing that can be known before it is built stands against it."""
    device = model.device
    if device.type != "cuda":
        return f"its kernel needs CUDA, and the model is on {device.type}"
    return model_obstacle(model, device_facts(device)) or compiler_obstacle()


def model_obstacle(model: Transformer, device: Device) -> str:
    """As program_obstacle, of model's formats and shapes on such a device."""
    if features := extras(model.config):
        return f"it does not compute {', '.join(features)}"
    blocks = _projected(model)
    for modules in blocks:
        if not all(isinstance(module, (SparseLinear, QuantizedLinear)) for module in modules):
            return "weights are not in the kernels' layout"
    head: nn.Module = model.lm_head
    weights = [_weight(module) for modules in blocks for module in modules]
    if isinstance(head, QuantizedHead):
        weights.append(_weight(head))
    elif team_of(model) is None and not _is_float_head(head):  # that of several ranks is computed outside
        return f"a head of {type(head).__name__} in {head.weight.dtype} is not supported"
    if reason := weight_obstacle(weights):
        return reason
    if not isinstance(embedding := _embedding(model), (nn.Embedding, QuantizedEmbedding)):
        return f"an embedding of {type(embedding).__name__} is not supported"
    if other := _floats(model, weights) - {model.dtype}:
        return f"{other.pop()} in a model of {model.dtype} is not supported"
    formats = [tuple(Format.of(_weight(module)) for module in modules) for modules in blocks]
    if len(set(formats)) > 1:
        return "blocks of different formats are not supported"
    return shape_obstacle(_described(model), device)


def _floats(model: Transformer, weights: list[Weight]) -> set[torch.dtype]:
    """Types of all floats that the kernel reads as the model's."""
    found = {weight.dtype for weight in weights}
    for module in model.modules():
        if isinstance(module, RMSNorm) or type(module) in (nn.Embedding, OutputHead):
            found.add(module.weight.dtype)  # type: ignore[arg-type]
        elif isinstance(module, (SparseLinear, QuantizedLinear)) and module.bias is not None:
            found.add(module.bias.dtype)
    return found


def _described(model: Transformer) -> Model:
    """What the plan must know of model."""
    blocks = _projected(model)
    qkv, o, gate_up, down = (Format.of(_weight(module)) for module in blocks[0])
    heads: list[nn.Module] = [model.lm_head] if isinstance(model.lm_head, QuantizedHead) else []
    weights = ([_weight(module) for module in modules] for modules in (*zip(*blocks, strict=True), heads))
    refined = tuple(tuple(w.refined.cpu() for w in product if w.refined is not None) for product in weights)
    cache_bits = 8 if has_int8_cache(model) else 16
    team = team_of(model)
    rank = Rank(0, 1) if team is None else team.rank
    head = Format.of(_weight(heads[0])) if heads else None
    products = (qkv, o, gate_up, down)
    return Model(
        model.config, model.dtype, products, head, cache_bits, rank.index, rank.count, refined,
        embedding_bits=32 if isinstance(_embedding(model), QuantizedEmbedding) else 16,
    )  # fmt: skip


def _is_float_head(head: nn.Module) -> bool:
    return type(head) is OutputHead and head.weight.dtype in (torch.bfloat16, torch.float16)


def _embedding(model: Transformer) -> nn.Module:
    """The embedding, or a rank's part of it."""
    embedding: nn.Module = model.embedding
    return embedding.inner if isinstance(embedding, SharedEmbedding) else embedding


def _projected(model: Transformer) -> list[list[nn.Module]]:
    """The modules of each block's projections."""
    return [[block.get_submodule(p.module) for p in block.projections()] for block in model.blocks]


def _weight(module: nn.Module) -> Weight:
    assert isinstance(module, (SparseLinear, QuantizedLinear)) and isinstance(module.weight, Tensor)
    return Weight(module.weight, module.scales, module.zeros, module.refined)
