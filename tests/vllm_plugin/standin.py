"""What teal/vllm_plugin needs of vLLM, small enough to read: its interface, without an engine.

tests/vllm_plugin/test_real_vllm.py compares these signatures with those of the installed package, where there is one.
Weights are cut over ranks by the same attributes of a parameter: input_dim, output_dim, packed_dim and packed_factor.
"""

import enum
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# Of a model for tests that need no checkpoint: fields of ModelConfig
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 32, "max_seq_len": 64,
}  # fmt: skip
METHODS: dict[str, type] = {}  # what register_quantization_config was called with


class CUDAGraphMode(enum.Enum):
    """How steps run: without graphs, in pieces, whole; or one way for decode steps and another for the rest."""

    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_AND_PIECEWISE = (2, 1)

    def separate_routine(self) -> bool:
        return isinstance(self.value, tuple)

    def decode_mode(self) -> "CUDAGraphMode":
        return CUDAGraphMode(self.value[0]) if isinstance(self.value, tuple) else self


@dataclass
class CompilationConfig:
    """Of an engine."""

    cudagraph_mode: CUDAGraphMode = CUDAGraphMode.NONE
    max_cudagraph_capture_size: int | None = None


@dataclass
class ForwardContext:
    """Of a step; its first fields are not needed here."""

    no_compile_layers: dict[str, Any]
    attn_metadata: Any
    slot_mapping: Any
    cudagraph_runtime_mode: CUDAGraphMode = CUDAGraphMode.NONE


@dataclass
class Engine:
    """What a test sets: the engine's config, its rank of several, and the step's context."""

    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)
    model_config: Any = field(
        default_factory=lambda: SimpleNamespace(hf_config=SimpleNamespace(), hf_text_config=SimpleNamespace())
    )
    rank: int = 0
    ranks: int = 1
    context: ForwardContext | None = None


engine = Engine()


def get_current_vllm_config() -> Engine:
    return engine


def get_forward_context() -> ForwardContext:
    assert engine.context is not None
    return engine.context


def is_forward_context_available() -> bool:
    return engine.context is not None


def set_weight_attrs(weight: Tensor, weight_attrs: dict[str, Any] | None) -> None:
    for name, value in (weight_attrs or {}).items():
        assert not hasattr(weight, name)
        setattr(weight, name, value)


class QuantizeMethodBase:
    """Of a layer: makes its parameters, and computes with them."""

    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        raise NotImplementedError

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """After all are loaded."""


class LinearMethodBase(QuantizeMethodBase):
    """Of a linear layer."""


class UnquantizedLinearMethod(LinearMethodBase):
    """The engine's own."""


class UnquantizedEmbeddingMethod(QuantizeMethodBase):
    """The engine's own."""


class QuantizationConfig:
    """Of a model: finds the method of each layer."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def register_quantization_config(quantization: str) -> Callable[[type], type]:
    def register(cls: type) -> type:
        assert issubclass(cls, QuantizationConfig)
        METHODS[quantization] = cls
        return cls

    return register


class Layer(nn.Module):
    """Whose parameters its method makes."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class LinearBase(Layer):
    """A linear layer of K inputs that stacks outputs of so many widths; cut over the engine's ranks."""

    cut = "output_dim"

    def __init__(self, K: int, sizes: list[int], config: Any, prefix: str) -> None:
        super().__init__()
        ranks = engine.ranks
        self.sizes = [size // ranks for size in sizes] if self.cut == "output_dim" else sizes
        own_K = K if self.cut == "output_dim" else K // ranks
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, own_K, self.sizes, K, sum(sizes), torch.get_default_dtype(), weight_loader=self.weight_loader
        )

    def weight_loader(self, param: Any, loaded: Tensor, shard: int | None = None) -> None:
        """Copy this rank's part of a stacked projection's tensor into its columns."""
        target, dim = param.data, getattr(param, self.cut, None)
        if dim is not None and self.cut == "input_dim":
            loaded = loaded.narrow(dim, engine.rank * target.shape[dim], target.shape[dim])
        elif dim is not None:
            unit = param.packed_factor if getattr(param, "packed_dim", None) == dim else 1
            begin, size = (n // unit for n in (sum(self.sizes[: shard or 0]), self.sizes[shard or 0]))
            target = target.narrow(dim, begin, size)
            loaded = loaded.narrow(dim, engine.rank * size, size)
        assert target.shape == loaded.shape
        target.copy_(loaded)

    def forward(self, x: Tensor) -> Tensor:
        return self.quant_method.apply(self, x, None)


class RowParallelLinear(LinearBase):
    """Its inputs are cut, and the ranks' results add up."""

    cut = "input_dim"


class VocabParallelEmbedding(Layer):
    """An embedding whose tokens are cut over the engine's ranks, padded to multiples of 64."""

    def __init__(self, V: int, C: int, config: Any, prefix: str = "") -> None:
        super().__init__()
        padded = -(-V // 64) * 64 // engine.ranks
        begin = min(engine.rank * padded, V)
        self.shard_indices = SimpleNamespace(
            org_vocab_start_index=begin, org_vocab_end_index=min(begin + padded, V)
        )  # fmt: skip
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, C, [padded], C, padded * engine.ranks, params_dtype=torch.get_default_dtype(), weight_loader=None
        )


class ParallelLMHead(VocabParallelEmbedding):
    """An output head."""


class Attention(nn.Module):
    """Has no weights."""


def bare(kind: Any) -> Any:
    """An instance without weights, as vLLM shows it to get_quant_method."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


CONTENT: dict[str, dict[str, Any]] = {
    "vllm": {"__version__": "0.32.0"},
    "vllm.compilation": {},
    "vllm.config": {
        "CUDAGraphMode": CUDAGraphMode,
        "CompilationConfig": CompilationConfig,
        "get_current_vllm_config": get_current_vllm_config,
    },
    "vllm.forward_context": {
        "ForwardContext": ForwardContext,
        "get_forward_context": get_forward_context,
        "is_forward_context_available": is_forward_context_available,
    },
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.linear": {
        "LinearBase": LinearBase,
        "LinearMethodBase": LinearMethodBase,
        "UnquantizedLinearMethod": UnquantizedLinearMethod,
    },
    "vllm.model_executor.layers.quantization": {"register_quantization_config": register_quantization_config},
    "vllm.model_executor.layers.quantization.base_config": {
        "QuantizationConfig": QuantizationConfig,
        "QuantizeMethodBase": QuantizeMethodBase,
    },
    "vllm.model_executor.layers.vocab_parallel_embedding": {
        "ParallelLMHead": ParallelLMHead,
        "UnquantizedEmbeddingMethod": UnquantizedEmbeddingMethod,
        "VocabParallelEmbedding": VocabParallelEmbedding,
    },
    "vllm.model_executor.utils": {"set_weight_attrs": set_weight_attrs},
}


@contextmanager
def installed() -> Iterator[Engine]:
    """Within the block `import vllm` finds the stand-in, and the plugin is imported anew."""
    ours = ("vllm", "teal.vllm_plugin.")
    before = {name: module for name, module in sys.modules.items() if name == "vllm" or name.startswith(ours)}
    for name in before:
        del sys.modules[name]
    for name, content in CONTENT.items():
        module = ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    try:
        yield engine
    finally:
        for name in [name for name in sys.modules if name == "vllm" or name.startswith(("vllm.", ours[1]))]:
            del sys.modules[name]
        sys.modules.update(before)
        engine.__init__()  # type: ignore[misc]
        METHODS.clear()
