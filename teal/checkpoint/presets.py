"""Architectures of well-known models, for measuring speed with random weights and no download."""

from typing import Any

import torch

from teal.architectures import ARCHITECTURES
from teal.checkpoint.sharding import part_config
from teal.checkpoint.weights import empty_model
from teal.model import ModelConfig, RopeScaling, Transformer
from teal.options import check_architecture
from teal.parallel import Rank


def _config(fields: dict[str, Any]) -> ModelConfig:
    scaling = fields.get("rope_scaling")
    return ModelConfig(**fields | {"rope_scaling": RopeScaling(**scaling) if scaling else None})


PRESETS = {name: _config(fields) for name, fields in ARCHITECTURES.items()}

INIT_STD = 0.02  # as the families initialise; speed does not depend on it, finite logits do


def find_preset(name: str, parameter: str = "random_weights") -> ModelConfig:
    """The architecture of this name, whatever its case; parameter is the one that named it. Raises UserError."""
    return PRESETS[check_architecture(name, parameter)]


def random_model(name: str, device: torch.device, dtype: torch.dtype, rank: Rank | None = None) -> Transformer:
    """The named architecture, or a rank's part, with seeded normal weights, made on the device. Raises UserError."""
    config = find_preset(name)
    model = empty_model(config if rank is None else part_config(config, rank), device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=INIT_STD, generator=generator)
    return model
