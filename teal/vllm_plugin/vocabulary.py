"""Rounded embeddings and output heads within vLLM, whose rows or columns are cut by vocabulary."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from teal.errors import UserError
from teal.kernels.quantized_matmul import quantized_matmul
from teal.kernels.sparse_linear import sparse_linear
from teal.layers.quantized_embedding import vectors
from teal.layers.quantized_linear import QuantConfig
from teal.options import MAX_ROWS
from teal.vllm_plugin.linear import Layer, rounded_parts


class TealHeadMethod(QuantizeMethodBase):
    """An output head of 8 or 4 bits, groups along the output. Logits are fp32."""

    def __init__(self, name: str, quant: QuantConfig) -> None:
        self.name, self.quant = name, quant

    def create_weights(
        self, layer: Layer, input_size_per_partition: int, output_partition_sizes: list[int],
        *_whole_sizes: int, params_dtype: torch.dtype, **_attributes: object,
    ) -> None:  # fmt: skip
        """Empty parameters as a checkpoint has them. Raises UserError if ranks would cut groups."""
        N, group = sum(output_partition_sizes), self.quant.group_size
        if N % group:
            raise UserError(f"{self.name}: {N} tokens a device are not whole groups of {group}: use fewer devices")
        K, refined = input_size_per_partition, self.quant.refined_head
        parts = rounded_parts(K, N, params_dtype, self.quant.head_bits, group, refined=refined)
        for name, (values, _) in parts.items():
            add_part(layer, name, values, N // values.shape[1], dim=1)
        layer.register_buffer("threshold", torch.zeros(1, dtype=torch.float32), persistent=False)
        if refined:
            channels = Parameter(torch.empty(refined, dtype=torch.int32), requires_grad=False)
            layer.register_parameter("refined", channels)

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [B, K] -> fp32 [B, N]."""
        weight = (layer.scales, getattr(layer, "zeros", None), getattr(layer, "refined", None))
        if len(x) <= MAX_ROWS:
            N = layer.scales.shape[1] * self.quant.group_size
            y = sparse_linear(x, layer.qweight, layer.threshold, [N], *weight, torch.float32)
        else:
            y = quantized_matmul(x, layer.qweight, *weight, torch.float32)
        return y if bias is None else y + bias

    def tie_weights(self, layer: Layer, embed_tokens: Layer) -> Layer:
        """A rounded head keeps its own weight, whatever the checkpoint's config says."""
        return layer


class TealEmbeddingMethod(QuantizeMethodBase):
    """An embedding of signed bytes with groups along a token's vector."""

    def __init__(self, quant: QuantConfig) -> None:
        self.quant = quant

    def create_weights(
        self, layer: Layer, input_size_per_partition: int, output_partition_sizes: list[int],
        *_whole_sizes: int, params_dtype: torch.dtype, **_attributes: object,
    ) -> None:  # fmt: skip
        """Empty parameters as a checkpoint has them."""
        V, C = sum(output_partition_sizes), input_size_per_partition
        add_part(layer, "qweight", torch.empty(V, C, dtype=torch.int8), 1, dim=0)
        add_part(layer, "scales", torch.empty(V, C // self.quant.group_size, dtype=params_dtype), 1, dim=0)

    def embedding(self, layer: Layer, tokens: Tensor) -> Tensor:
        """tokens int64 [...] -> [..., C] in the scales' dtype."""
        return vectors(layer.qweight, layer.scales, tokens).to(layer.scales.dtype)

    def apply(self, layer: Layer, *args: object, **kwargs: object) -> Tensor:
        """An embedding multiplies nothing: a head that shares it is rounded apart from it."""
        raise NotImplementedError


def add_part(layer: Layer, name: str, values: Tensor, tokens: int, dim: int) -> None:
    """Register a parameter, of so many tokens to an entry along dim, that takes its rank's part of a checkpoint's."""
    parameter = Parameter(values, requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, {"weight_loader": vocabulary_loader(layer, tokens, dim)})


def vocabulary_loader(layer: Layer, tokens: int, dim: int) -> Callable[[Parameter, Tensor], None]:
    """What copies a rank's tokens of a whole tensor into its parameter, with zeros for padding."""

    def load(parameter: Parameter, loaded: Tensor) -> None:
        begin, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        part = loaded.narrow(dim, begin // tokens, (end - begin) // tokens)
        parameter.data.zero_()
        parameter.data.narrow(dim, 0, part.shape[dim]).copy_(part)

    return load
