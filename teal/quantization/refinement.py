"""Which channels of a weight get 8 bits where the rest has 4: those where a byte takes off most of the loss.

Rounding input channel i of a projection costs about E[x_i^2] E[g^2] |w_i - rounded w_i|^2 / 2 nats a token. Tokens
count by their gradients g (calibration/energy.py). A second row of 4 bits takes off nearly all of this cost. So
channels are taken by cost per byte, over all modules of all layers, until the bytes are spent: the marginal rule.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from teal.calibration.energy import ChannelEnergy, channel_energies, head_energy
from teal.checkpoint.weights import layer_prefix, load_model
from teal.files import atomic_file
from teal.hardware import pick_device, pick_dtype
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import QuantConfig, round_to_nearest
from teal.model import ModelConfig, Transformer
from teal.quantization.shards import HEAD

WEIGHTS_AT_ONCE = 1 << 24  # whose rounding errors are there in fp32
UNIT = 16  # channels refined together: kernels loop over rows in such steps
Refined = dict[str, Tensor]  # int32 [E] by the Hugging Face name of a projection; equal for those of one module


@dataclass(slots=True)
class Costs:
    """What rounding each input channel of a module to 4 bits costs, in nats a token [K]; columns: its outputs."""

    channels: Tensor
    columns: int


def best_channels(modules: Sequence[Costs], bits: float) -> list[Tensor]:
    """The channels of each module to refine, int32 [E] in rising order, so that a weight has at most bits on average.

    In units of UNIT channels, the best of a module first. Only values count as bits, scales do not.
    """
    weights = sum(len(costs.channels) * costs.columns for costs in modules)
    left = round((bits - 4) / 4 * weights)  # weights that may have 4 bits more
    orders = [costs.channels.argsort(descending=True, stable=True) for costs in modules]
    units = [
        (float(costs.channels[unit].sum()) / (len(unit) * costs.columns), m, len(unit) * costs.columns)
        for m, (costs, order) in enumerate(zip(modules, orders, strict=True))
        for unit in order.split(UNIT)
    ]
    taken = [0] * len(modules)
    # Sorting is stable: the units of a module stay in their order. One that does not fit leaves room for a smaller one.
    for _, m, size in sorted(units, key=lambda unit: -unit[0]):
        if size <= left:
            left -= size
            taken[m] += UNIT
    return [order[:count].sort().values.int() for order, count in zip(orders, taken, strict=True)]


def channel_costs(weight: Tensor, sizes: Sequence[int], energies: Sequence[ChannelEnergy], group_size: int) -> Costs:
    """Of weight [K, N], which stacks projections of sizes columns with these energies. Some rows at a time."""
    K, N = weight.shape
    seen = torch.empty(len(sizes), K, device=weight.device)  # |error|^2 of a channel, as the gradients see it
    step = max(1, WEIGHTS_AT_ONCE // N)
    for k in range(0, K, step):
        rows = weight[k : k + step].contiguous()
        error = (rows.float() - dequantize(*round_to_nearest(rows, 4, group_size)).float()).square()
        for own, part, energy in zip(seen, error.split(list(sizes), dim=1), energies, strict=True):
            g = energy.gradients
            own[k : k + step] = part @ g.to(part.device) if isinstance(g, Tensor) else g * part.sum(1)
    inputs = torch.stack([energy.inputs for energy in energies])
    return Costs((inputs * seen.cpu() / 2).sum(0), N)


def choose_refined(model: Transformer, scheme: QuantConfig, sequences: Tensor) -> Refined:
    """The channels to refine of a float model, from its energies on sequences int64 [S, L] of token ids."""
    assert scheme.average_bits is not None
    found: Refined = {}
    costs, names = [], []
    energies = channel_energies(model, sequences)
    with torch.inference_mode():
        for i, (block, own) in enumerate(zip(model.blocks, energies, strict=True)):
            for p in block.projections():
                weight = block.get_submodule(p.module).weight.t()  # type: ignore[operator]
                costs.append(channel_costs(weight, p.sizes, [own[n] for n in p.names], scheme.group_size))
                names.append([layer_prefix(i) + name for name in p.hf_names])
        for stacked, channels in zip(names, best_channels(costs, scheme.average_bits), strict=True):
            found |= dict.fromkeys(stacked, channels)
        if scheme.has_int4_head:
            weight, energy = model.lm_head.weight.t(), head_energy(model, sequences)
            head = channel_costs(weight, [weight.shape[1]], [energy], scheme.group_size)
            [found[HEAD]] = best_channels([head], scheme.average_bits)
    return found


def refined_channels(source: Path, scheme: QuantConfig, sequences: Tensor, device: str, notes: Path) -> Refined:
    """As choose_refined for the model in a folder, which is in memory for so long. A later call finds it in notes."""
    try:
        return {name: torch.tensor(rows, dtype=torch.int32) for name, rows in json.loads(notes.read_bytes()).items()}
    except FileNotFoundError:
        pass
    where = pick_device(device)
    found = choose_refined(load_model(source, where, pick_dtype("auto", where, sparse=False).dtype), scheme, sequences)
    with atomic_file(notes) as temporary:
        temporary.write_text(json.dumps({name: rows.tolist() for name, rows in found.items()}), encoding="utf-8")
    return found


def with_counts(scheme: QuantConfig, config: ModelConfig, refined: Mapping[str, Tensor]) -> QuantConfig:
    """scheme with how many channels of each module are refined, as config.json keeps it."""
    layers = tuple(
        tuple(len(refined[layer_prefix(i) + p.hf_names[0]]) for p in config.projections())
        for i in range(config.num_layers)
    )
    return replace(scheme, refined=layers, refined_head=len(refined.get(HEAD, ())))
