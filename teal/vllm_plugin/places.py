"""Where in a model a linear layer of vLLM stands, by its name: "model.layers.3" and so on."""

import re
from typing import NamedTuple

from teal.checkpoint.families import GATE_UP, QKV
from teal.errors import UserError
from teal.model import ModelConfig
from teal.projection import Projection

STACKED = QKV | GATE_UP  # as vLLM has them, of whatever family
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
OTHER_STACKS = ("vision", "visual", "audio", "encoder", "tower", "projector")  # of models that read more than text


class Place(NamedTuple):
    """A layer's place: the block's number, the projection, and those of its names that are stacked here."""

    block: int
    projection: int  # its number in ModelConfig.projections
    names: tuple[str, ...]


def stacked_modules(config: ModelConfig) -> dict[str, tuple[Projection, tuple[str, ...]]]:
    """The name of a module in a layer, alone or stacked -> the projection, and which of its names it holds."""
    found: dict[str, tuple[Projection, tuple[str, ...]]] = {}
    for p in config.projections():
        for name, hf_name in zip(p.names, p.hf_names, strict=True):
            found[hf_name] = (p, (name,))
        found |= {whole: (p, p.names) for whole, parts in STACKED.items() if parts == p.hf_names}
    return found


def find_place(config: ModelConfig, prefix: str) -> Place | None:
    """The place of the linear layer that vLLM calls prefix; None outside the blocks that read text.

    Raises UserError for a layer of a block that no plan and no rounded checkpoint knows.
    """
    match = LAYER.search(prefix)
    if match is None or any(part in prefix for part in OTHER_STACKS):
        return None
    block, module = int(match[1]), match[2]
    if (found := stacked_modules(config).get(module)) is None or block >= config.num_layers:
        raise UserError(
            f"layer {prefix} is not supported by teal; expected one of {', '.join(stacked_modules(config))} in "
            f"{config.num_layers} layers: serve this model without it"
        )
    projection, names = found
    return Place(block, config.projections().index(projection), names)
