"""Rotation: an orthogonal change of basis of a model's activations, folded into its weights; its text stays the same.

RMSNorm commutes with an orthogonal Q once its weight is folded into the products behind it (SliceGPT, Ashkboos et al.
2024, section 3). With z = x / rms(x) the residual stream x becomes x Q:

    embedding, head            E Q,  H diag(norm) Q
    q, k, v, gate, up          W diag(norm) Q           weights as Hugging Face stores them, [out, in]
    o, down                    Q^T W,  bias Q

Within attention each key/value head has an R of its own: v becomes v R, and o's inputs from its query heads with it.
Norms become ones. A head that was tied to the embedding gets a weight of its own.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from teal.checkpoint.weights import block_targets, open_shard
from teal.errors import UserError
from teal.files import atomic_file
from teal.model import Block, ModelConfig, Projection, Transformer
from teal.plan import Weights

ROWS = 8192  # of embedding and head that are turned at once, in fp64
MAX_ERROR = 1e-3  # of R^T R beside the identity, in a file


@dataclass(frozen=True, slots=True)
class Rotation:
    """Orthogonal matrices, fp32: residual [C, C], or None to leave the stream as it is; heads [layers, K, D, D]."""

    residual: Tensor | None
    heads: Tensor

    @property
    def identity(self) -> str:
        """16 hex digits that name it by content."""
        digest = hashlib.sha256()
        for tensor in (self.residual, self.heads):
            digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def weights(self, source: Weights) -> Weights:
        """What plans know the rotated weights of source by."""
        identity = hashlib.sha256(f"{source.identity} {self.identity}".encode()).hexdigest()[:16]
        return Weights(f"{source.name}, rotated", identity)

    def save(self, path: Path) -> None:
        """Write it as a safetensors file, atomically."""
        tensors = {"heads": self.heads} | ({} if self.residual is None else {"residual": self.residual})
        with atomic_file(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, path: Path, config: ModelConfig) -> "Rotation":
        """Read it. Raises UserError if it is none, damaged, or for a model of other sizes."""
        with open_shard(path) as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - safe_open is no dict
        c = config
        shapes = {"residual": (c.hidden_size,) * 2, "heads": (c.num_layers, c.num_kv_heads, c.head_dim, c.head_dim)}
        for name, tensor in found.items():
            if tuple(tensor.shape) != shapes.get(name) or tensor.dtype != torch.float32:
                raise UserError(f"{path}: {name} {tuple(tensor.shape)} is not of a rotation for this model: {shapes}")
            error = tensor.mT @ tensor - torch.eye(tensor.shape[-1])
            if not float(error.abs().max()) < MAX_ERROR:
                raise UserError(f"{path}: {name} is not orthogonal; the file is damaged, find the rotation again")
        if "heads" not in found:
            raise UserError(f"{path}: holds {sorted(found)}; expected a rotation with heads, as calibrate.py writes it")
        return cls(found.get("residual"), found["heads"])


def times(matrix: Tensor, rotation: Tensor) -> Tensor:
    """matrix [..., n] @ rotation [n, n], in fp64, a part at a time."""
    turned = rotation.to(matrix.device, torch.float64)
    return torch.cat([part.double() @ turned for part in matrix.split(ROWS)])


def rotate_layer(block: Block, i: int, tensors: dict[str, Tensor], rotation: Rotation) -> dict[str, Tensor]:
    """The rotated weights of layer i, fp64 where they change; tensors: those of its projections and norms, by HF name.

    block describes the layer; its own weights are not looked at.
    """
    found = dict(tensors)
    norms = {id(norm): f"{name}.weight" for name, norm in block.norms().items()}
    for p in block.projections():
        norm = norms[id(block.get_submodule(p.norm))]
        for name, size in zip(p.names, p.hf_names, strict=True):
            _rotate_projection(block.config, p, name, size, found, tensors[norm], rotation, i)
        if rotation.residual is not None and p.input == "normed":
            found[norm] = torch.ones_like(tensors[norm])
    return found


def _rotate_projection(
    config: ModelConfig, p: Projection, name: str, hf_name: str, found: dict[str, Tensor], norm: Tensor,
    rotation: Rotation, i: int,
) -> None:  # fmt: skip
    """Rotate one projection's weight and bias within found."""
    Q, R = rotation.residual, rotation.heads[i]
    K, G, D = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
    weight = found[f"{hf_name}.weight"].double()
    bias = found.get(f"{hf_name}.bias")
    turned = R.to(weight.device, torch.float64)
    if name == "v":
        weight = torch.einsum("kde,kdc->kec", turned, weight.view(K, D, -1)).reshape(weight.shape)
        bias = None if bias is None else torch.einsum("kde,kd->ke", turned, bias.double().view(K, D)).flatten()
    elif name == "o":
        weight = torch.einsum("nkgd,kde->nkge", weight.view(-1, K, G, D), turned).reshape(weight.shape)
    if Q is not None and p.input == "normed":
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
    """Embedding [V, C], final norm [C] and head [V, C], rotated, in the dtypes given."""
    Q = rotation.residual
    if Q is None:
        return embedding, norm, head
    turned = times(embedding, Q).to(embedding.dtype)
    return turned, torch.ones_like(norm), times(head * norm.double(), Q).to(head.dtype)


@torch.inference_mode()
def rotate(model: Transformer, rotation: Rotation) -> Transformer:
    """Rotate a dense model in floats in place, a weight at a time; it then has a head of its own."""
    for i, block in enumerate(model.blocks):
        targets = block_targets(block)
        for name, value in rotate_layer(block, i, targets, rotation).items():
            targets[name].copy_(value)
    ends = rotate_ends(model.embedding.weight, model.norm.weight, model.lm_head.weight, rotation)
    model.lm_head.weight = nn.Parameter(ends[2], requires_grad=False)
    model.embedding.weight.copy_(ends[0])
    model.norm.weight.copy_(ends[1])
    model.config = replace(model.config, tie_embeddings=False)
    return model
