"""The safetensors files of a quantized folder: one for each layer and one for the rest, written one after the other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from teal.checkpoint.config import load_config
from teal.checkpoint.layout import open_shard
from teal.checkpoint.weights import (
    check_finite,
    hf_projection_names,
    layer_prefix,
    stored_config,
    tensor_files,
    write_index,
)
from teal.errors import UserError
from teal.files import atomic_file
from teal.hardware import pick_device
from teal.layers.quantized_linear import Packed, QuantConfig, round_in_two_terms, round_input_groups, round_to_nearest
from teal.progress import progress
from teal.quantization.gptq import BlockwiseGptq
from teal.quantization.half_quadratic import half_quadratic

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
METHODS = {"rtn": round_to_nearest, "hqq": half_quadratic}  # of a weight by itself


@dataclass(slots=True)
class Rounding:
    """How weights are rounded: by "rtn", "hqq" or, on device and for sequences of token ids [S, L], by "gptq".

    refined: the channels with a second row, int32 [E], by the name of a projection. An embedding and a head of 8 bits
    are rounded to nearest, whatever the method.
    """

    method: str = "rtn"
    refined: Mapping[str, Tensor] = field(default_factory=dict)
    sequences: Tensor | None = None
    device: str = "auto"

    def weight(self, name: str, weight: Tensor, scheme: QuantConfig) -> Packed | None:
        """The parts of a projection's or the head's weight [N, K], or an embedding [V, C]; None if gptq makes them."""
        if name == EMBEDDING:
            return round_to_nearest(weight, 8, scheme.group_size)
        head, size = name == HEAD, scheme.group_size
        bits = scheme.head_bits if head else scheme.bits
        method = self.method if scheme.has_int4_head or not head else "rtn"
        if method == "gptq":
            return None
        refined = self.refined.get(name)
        if refined is not None:
            return round_in_two_terms(weight.t().contiguous(), refined, size)
        if scheme.by_input and not head:
            return round_input_groups(weight, bits, size, METHODS[method])
        return METHODS[method](weight.t().contiguous(), bits, size)


def write_shards(source: Path, work: Path, scheme: QuantConfig, rounding: Rounding) -> None:
    """The shards of source's quantized model in work, skipping those that are there, and their index.

    Raises UserError for weights that are not finite, or of several dtypes in a layer.
    """
    jobs = _jobs(source, scheme)
    projections = hf_projection_names(load_config(source))
    gptq = None
    if rounding.method == "gptq":
        assert rounding.sequences is not None
        where = {name: path for names in jobs for name, path in names.items()}
        device = pick_device(rounding.device)
        gptq = BlockwiseGptq(source, scheme, rounding.sequences, where, device, rounding.refined)
    index: dict[str, str] = {}
    total = 0
    for i, names in enumerate(progress(jobs, "quantizing", "layer")):
        path = work / f"model-{i + 1:05}-of-{len(jobs):05}.safetensors"
        is_layer = i + 1 < len(jobs)
        if not path.exists():
            tensors = quantized_tensors(names, projections, scheme, rounding, gptq)
            if gptq is not None and is_layer:
                tensors |= gptq.layer(i)
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata={"format": "pt"})
        elif gptq is not None and is_layer:
            gptq.skip(i, path)
        with open_shard(path) as shard:
            index |= dict.fromkeys(shard.keys(), path.name)
        total += path.stat().st_size
    write_index(work, index, total)


def _jobs(source: Path, scheme: QuantConfig) -> list[dict[str, Path]]:
    """The tensors of each output shard by name, with the file that holds them: the layers, then all else."""
    where, config = tensor_files(source), stored_config(source)
    if scheme.lm_head and config.tie_embeddings:
        where[f"{HEAD}.weight"] = where[f"{EMBEDDING}.weight"]
    elif config.tie_embeddings:
        where.pop(f"{HEAD}.weight", None)
    prefixes = [layer_prefix(i) for i in range(config.num_layers)]
    jobs = [{name: path for name, path in where.items() if name.startswith(prefix)} for prefix in prefixes]
    layers = set().union(*jobs)
    return [*jobs, {name: path for name, path in where.items() if name not in layers}]


def quantized_tensors(
    names: dict[str, Path],
    projections: set[str],
    scheme: QuantConfig,
    rounding: Rounding,
    gptq: BlockwiseGptq | None,
) -> dict[str, Tensor]:
    """What a shard holds of these tensors: weights of projections rounded, or left to gptq.layer, the rest as it is.

    gptq: of method "gptq", for the head, past all blocks when it comes to it. Raises UserError.
    """
    result: dict[str, Tensor] = {}
    dtypes: dict[Any, str] = {}
    for name, path in sorted(names.items()):
        with open_shard(path) as tensors:
            stored = f"{EMBEDDING}.weight" if name not in tensors.keys() else name  # noqa: SIM118 - a tied head
            tensor = tensors.get_tensor(stored)
        check_finite(tensor, path, name)
        prefix, _, part = name.rpartition(".")
        is_end = (prefix == HEAD and scheme.lm_head) or (prefix == EMBEDDING and scheme.embedding)
        is_rounded = prefix in projections or is_end
        if part != "weight" or not is_rounded:
            result[name] = tensor.contiguous()
            continue
        dtypes.setdefault(tensor.dtype, name)
        if len(dtypes) > 1:
            (one, first), (other, second) = dtypes.items()
            raise UserError(f"{path}: {first} is {one} and {second} is {other}; expected one dtype in a layer")
        parts = rounding.weight(prefix, tensor, scheme)
        if parts is None and prefix == HEAD:
            assert gptq is not None
            parts = gptq.head(tensor, rounding.refined.get(HEAD))
        if parts is not None:
            refined = rounding.refined.get(prefix, torch.empty(0)).clone()  # a file holds no tensor twice
            stored_parts = zip(("qweight", "scales", "zeros", "refined"), (*parts, refined), strict=True)
            result |= {f"{prefix}.{n}": t for n, t in stored_parts if t is not None and len(t)}
    return result
