"""Rotation: an orthogonal change of basis of a model's activations, folded into its weights; its text stays the same.

RMSNorm commutes with an orthogonal Q once its weight is folded into the products behind it (SliceGPT, Ashkboos et al.
2024, section 3). With z = x / rms(x) the residual stream x becomes x Q:

    embedding, head            E Q,  H diag(norm) Q
    q, k, v, gate, up          W diag(norm) Q           weights as Hugging Face stores them, [out, in]
    o, down                    Q^T W,  bias Q

Within attention each key/value head has an R of its own: v becomes v R, and o's inputs from its query heads with it.
Norms become ones. A head that was tied to the embedding gets a weight of its own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from teal.checkpoint.config import load_quantization
from teal.checkpoint.fields import read_json
from teal.checkpoint.identity import weights_identity
from teal.checkpoint.layout import open_shard, plain_description
from teal.checkpoint.weights import (
    block_targets,
    check_finite,
    copy_other_files,
    layer_prefix,
    stored_config,
    tensor_files,
    write_index,
)
from teal.errors import ParameterError, UserError
from teal.files import atomic_folder
from teal.model import Block, ModelConfig, Projection, Transformer
from teal.progress import progress

ROWS = 8192  # of embedding and head that are turned at once, in fp64
RECORD = "teal_rotation"  # the field of config.json that tells of it
VERSION = 1
PLAN_FILES = "teal-*.json"  # beside a checkpoint: of the unrotated weights


@dataclass(frozen=True, slots=True)
class Rotation:
    """Orthogonal matrices, fp32: residual [C, C], or None to leave the stream as it is; heads [layers, K, D, D].

    Weights are turned on their device, which must know fp64. A family with other norms than RMS norms before sublayers
    can only take heads: see turns_stream.
    """

    residual: Tensor | None
    heads: Tensor


def turns_stream(config: ModelConfig) -> bool:
    """Whether a residual stream can be rotated: RMS norms read it, and all that is added to it is linear."""
    return config.pre_norm and not config.post_norm and not config.layer_norm


def times(matrix: Tensor, rotation: Tensor) -> Tensor:
    """matrix [..., n] @ rotation [n, n], in fp64, a part at a time on rotation's device; the result is on matrix's."""
    device, turned = rotation.device, rotation.double()
    return torch.cat([(part.to(device).double() @ turned).to(matrix.device) for part in matrix.split(ROWS)])


def rotate_layer(block: Block, i: int, tensors: dict[str, Tensor], rotation: Rotation) -> dict[str, Tensor]:
    """The rotated weights of layer i, fp64 where they change; tensors: those of its projections and norms, by HF name.

    tensors are on rotation's device. block describes the layer; its own weights are not looked at.
    """
    found = dict(tensors)
    norms = {id(norm): f"{name}.weight" for name, norm in block.norms().items()}
    for p in block.projections():
        norm = norms[id(block.get_submodule(p.norm))]
        for name, hf_name in zip(p.names, p.hf_names, strict=True):
            _rotate_projection(block.config, p, name, hf_name, found, tensors.get(norm), rotation, i)
        if rotation.residual is not None and p.input == "normed":
            found[norm] = torch.ones_like(tensors[norm])
    return found


def _rotate_projection(
    config: ModelConfig, p: Projection, name: str, hf_name: str, found: dict[str, Tensor], norm: Tensor | None,
    rotation: Rotation, i: int,
) -> None:  # fmt: skip
    """Rotate one projection's weight and bias within found; norm is that of its input, if there is one."""
    Q, R = rotation.residual, rotation.heads[i]
    K, G, D = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
    weight = found[f"{hf_name}.weight"].double()
    bias = found.get(f"{hf_name}.bias")
    turned = R.double()
    if name == "v":
        weight = torch.einsum("kde,kdc->kec", turned, weight.view(K, D, -1)).reshape(weight.shape)
        bias = None if bias is None else torch.einsum("kde,kd->ke", turned, bias.double().view(K, D)).flatten()
    elif name == "o":
        weight = torch.einsum("nkgd,kde->nkge", weight.view(-1, K, G, D), turned).reshape(weight.shape)
    if Q is not None and p.input == "normed":
        assert norm is not None
        weight = times(weight * norm.double(), Q)
    elif Q is not None:
        weight = times(weight.t(), Q).t()
        bias = None if bias is None else times(bias[None], Q)[0]
    found[f"{hf_name}.weight"] = weight
    if bias is not None:
        found[f"{hf_name}.bias"] = bias


def rotate_ends(
    embedding: Tensor, norm: Tensor, head: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Embedding [V, C], final norm [C] and head [V, C], rotated: fp64 where they change."""
    Q = rotation.residual
    if Q is None:
        return embedding, norm, head
    return times(embedding, Q), torch.ones_like(norm), times(head * norm.double(), Q)


def rotation_record(folder: Path) -> dict[str, Any] | None:
    """What the config of a rotated checkpoint, or of one quantized from it, says of its rotation; None for others."""
    record = read_json(folder / "config.json").get(RECORD)
    if record is None:
        return None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise UserError(f"{folder / 'config.json'}: {RECORD} {record!r:.80} is not usable; this code reads {VERSION}")
    return record


def check_can_rotate(source: Path, output: Path) -> bool:
    """Whether output is the rotated source already. Raises UserError if source cannot be rotated, or output is another.

    Of rounded weights a rotation would make floats of all their errors, and several times their bytes.
    """
    if load_quantization(source) is not None:
        raise ParameterError("{rotate}: {} is quantized; rotate the original model, then quantize it", source)
    if rotation_record(source) is not None:
        raise ParameterError("{rotate}: {} is rotated already; leave the option out", source)
    if not output.exists():
        return False
    config = output / "config.json"
    record = rotation_record(output) if config.is_file() else None
    if record is None or record.get("source") != weights_identity(source):
        raise ParameterError("{rotate} {}: exists, and is not {} rotated; name another folder", output, source)
    return True


def write_rotated(source: Path, output: Path, rotation: Rotation, facts: dict[str, Any]) -> None:
    """The checkpoint in folder source, rotated, as folder output: a plain one of its family, in the same dtypes.

    Its tensors are as model.py holds them. Read and written a layer at a time. facts are kept in its config. Raises
    UserError for weights that are not finite, and for a stream that cannot be rotated.
    """
    config, where = stored_config(source), tensor_files(source)
    if rotation.residual is not None and not turns_stream(config):
        raise ParameterError("{rotate}: {} has other norms than RMS norms before sublayers; rotate heads alone", source)

    def read(name: str) -> Tensor:
        with open_shard(where[name]) as tensors:
            tensor = tensors.get_tensor(name)
        check_finite(tensor, where[name], name)
        return tensor

    with atomic_folder(output) as folder:
        if folder is None:
            return
        _write_shards(folder, config, rotation, read)
        copy_other_files(source, folder, PLAN_FILES)
        record = {"version": VERSION, "source": weights_identity(source), **facts}
        description = plain_description(source) | {"tie_word_embeddings": False, RECORD: record}
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, config: ModelConfig, rotation: Rotation, read: Callable[[str], Tensor]) -> None:
    """A file for each layer and one for embedding, norm and head, and their index."""
    with torch.device("meta"):
        block = Transformer(config).blocks[0]
    index: dict[str, str] = {}
    total, count = 0, config.num_layers + 1
    for i in progress(range(count), "rotating", "layer"):
        if i < config.num_layers:
            prefix = layer_prefix(i)
            before = {name: read(prefix + name).to(rotation.heads.device) for name in block_targets(block)}
            after = rotate_layer(block, i, before, rotation)
            found = {prefix + name: tensor.to(before[name].dtype).cpu() for name, tensor in after.items()}
        else:
            names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
            tied = [*names[:2], names[0]] if config.tie_embeddings else names
            ends = [read(name) for name in tied]
            turned = zip(names, ends, rotate_ends(ends[0], ends[1], ends[2], rotation), strict=True)
            found = {name: after.to(before.dtype) for name, before, after in turned}
            if config.layer_norm:
                found["model.norm.bias"] = read("model.norm.bias")
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / name, {"format": "pt"})
        index |= dict.fromkeys(found, name)
        total += (folder / name).stat().st_size
    write_index(folder, index, total)
