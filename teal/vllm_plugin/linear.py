"""How vLLM's linear layers hold and multiply weights here: floats or rounded ones, input-channel-major, [K, N].

vLLM cuts a layer over tensor parallel ranks by its parameters' attributes. Rounded weights are cut in whole groups.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from teal.errors import UserError
from teal.kernels.formats.packing import INPUT_GROUP_COLUMNS, check_refined
from teal.layers.quantized_linear import QuantConfig, QuantizedLinear
from teal.vllm_plugin.product import phased_linear

Layer = Any  # a module of vLLM's, whose parameters a method here has made


class TealLinearMethod(LinearMethodBase):
    """A projection, or several stacked ones, of a block.

    name: the layer's, for errors. thresholds: of |x|, one for each stacked projection; zeros keep all. counter: the
    number of what counts its kept entries, -1 if it is always dense. quant: how the weight is rounded; None is floats.
    refined: how many of its channels have a second row.
    """

    def __init__(
        self, name: str, thresholds: list[float], counter: int = -1, quant: QuantConfig | None = None, refined: int = 0
    ) -> None:
        self.name, self.thresholds, self.counter = name, thresholds, counter
        self.quant, self.refined = quant, refined

    def create_weights(
        self, layer: Layer, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra_weight_attrs: object,
    ) -> None:  # fmt: skip
        """Give the layer empty parameters under the names and in the form of a checkpoint's tensors, to be loaded.

        Raises UserError if ranks would cut groups or refined channels, or other projections are stacked than expected.
        """
        sizes, K, N = output_partition_sizes, input_size_per_partition, sum(output_partition_sizes)
        if len(sizes) != len(self.thresholds):
            raise UserError(
                f"layer {self.name} stacks {len(sizes)} projections, expected {len(self.thresholds)}: this model is "
                "not supported by teal"
            )
        layer.segments = sizes
        layer.register_buffer("thresholds", torch.tensor(self.thresholds, dtype=torch.float32), persistent=False)
        if self.quant is None:
            parts = {"weight": (torch.empty(N, K, dtype=params_dtype), {"input_dim": 1, "output_dim": 0})}
        else:
            self._check_cut(self.quant, K, sizes, input_size)
            rounding = (self.quant.bits, self.quant.group_size, self.quant.by_input, self.refined)
            parts = rounded_parts(K, N, params_dtype, *rounding)
        for name, (values, attributes) in parts.items():
            parameter = Parameter(values, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {**attributes, **extra_weight_attrs})
        if self.refined:
            channels = Parameter(torch.empty(self.refined, dtype=torch.int32), requires_grad=False)
            layer.register_parameter("refined", channels)  # each rank's and each stacked projection's are the same
            set_weight_attrs(channels, {"ignore_warning": True, **extra_weight_attrs})

    def _check_cut(self, quant: QuantConfig, K: int, sizes: list[int], whole_K: int) -> None:
        if self.refined and whole_K != K:
            raise UserError(f"layer {self.name} is of mixed bits, whose inputs cannot be cut: serve it on one device")
        unit = INPUT_GROUP_COLUMNS if quant.by_input else quant.group_size
        cuts = [(size, unit) for size in sizes] + ([(K, quant.group_size)] if quant.by_input else [])
        for width, group in cuts:
            if width % group:
                raise UserError(
                    f"layer {self.name}: {width} channels a device are not whole groups of {group}: use fewer devices"
                )

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Turn a weight of floats, [N, K] in checkpoints, into [K, N]."""
        if self.quant is None:
            turned = layer.weight.data.t().contiguous()
            layer.weight = Parameter(turned, requires_grad=False)
        elif self.refined:
            try:
                check_refined(layer.refined, len(layer.qweight) - self.refined)
            except ValueError as error:
                raise UserError(f"layer {self.name}: {error}; quantize the model again") from None

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]."""
        weight = layer.weight if self.quant is None else layer.qweight
        packing = (getattr(layer, name, None) for name in ("scales", "zeros", "refined"))
        y = phased_linear(x, weight, layer.thresholds, layer.segments, self.counter, *packing)
        return y if bias is None else y + bias


def rounded_parts(
    K: int, N: int, dtype: torch.dtype, bits: int, group_size: int, by_input: bool = False, refined: int = 0
) -> dict[str, tuple[Tensor, dict[str, int]]]:
    """The empty tensors of a weight [K, N] under a checkpoint's names, with what vLLM must know to cut each.

    Parameters are those of QuantizedLinear.
    """
    with torch.device("meta"):
        linear = nn.Linear(K, N, bias=False, dtype=dtype)
        module = QuantizedLinear(linear, bits, group_size, by_input, refined)
    found = {}
    for name, like in module.named_parameters():
        attributes = {"input_dim": 0, "output_dim": 1}
        if (together := N // like.shape[1]) > 1:  # columns to a word, or to a scale
            attributes |= {"packed_dim": 1, "packed_factor": together}
        found["qweight" if name == "weight" else name] = (torch.empty(like.shape, dtype=like.dtype), attributes)
    return found
