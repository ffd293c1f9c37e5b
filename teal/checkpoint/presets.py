"""Architectures of well-known models, for measuring speed with random weights and no download."""

from functools import partial
from typing import Any

import torch

from teal.architectures import ARCHITECTURES
from teal.checkpoint.sharding import part_config
from teal.checkpoint.weights import empty_model
from teal.layers.quantized_embedding import use_quantized_modules
from teal.layers.quantized_linear import QuantizedLinear, round_to_nearest
from teal.layers.rounding import scheme_of
from teal.model import ModelConfig, RopeScaling, Transformer
from teal.options import check_architecture
from teal.parallel import Rank
from teal.teal_layers import weight_tensors


def _config(fields: dict[str, Any]) -> ModelConfig:
    scaling = fields.get("rope_scaling")
    return ModelConfig(**fields | {"rope_scaling": RopeScaling(**scaling) if scaling else None})


PRESETS = {name: _config(fields) for name, fields in ARCHITECTURES.items()}

INIT_STD = 0.02  # as the families initialise; speed does not depend on it, finite logits do


def find_preset(name: str, parameter: str = "random_weights") -> ModelConfig:
    """The architecture of this name, whatever its case; parameter is the one that named it. Raises UserError."""
    return PRESETS[check_architecture(name, parameter)]


def random_model(
    name: str, device: torch.device, dtype: torch.dtype, rank: Rank | None = None, quant: str | None = None,
    quant_lm_head: str | None = None,
) -> Transformer:  # fmt: skip
    """The named architecture, or a rank's part, with seeded normal weights, made on the device. Raises UserError.

    quant and quant_lm_head: rounded as quantize does, a weight at a time, so that the floats need not fit.
    """
    config = find_preset(name)
    part = config if rank is None else part_config(config, rank)
    scheme = None if quant is None else scheme_of(part, quant, lm_head=quant_lm_head)
    model = empty_model(part, device, dtype, None if scheme is None else partial(use_quantized_modules, config=scheme))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=INIT_STD, generator=generator)

    rounded = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for module in rounded:
        weight = normal(len(module.weight), module.out_features)
        module.set_weight(*round_to_nearest(weight, module.bits, module.group_size))
    done = {id(tensor) for module in rounded for tensor in weight_tensors(module)}
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        elif id(parameter) not in done:
            parameter.normal_(std=INIT_STD, generator=generator)
    return model
