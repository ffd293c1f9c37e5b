"""The basis in which few channels carry most of the energy, found on a text: eigenvectors of what activations do there.

Q: of the sum, over layers and both norms, of tr(A) E[z z^T], with z = x / rms(x). tr(A) is the Fisher information of
what the norm's projections read: how much an error there costs. R, for each key/value head: of E[o o^T] over the inputs
of o that its query heads make. A basis fits the text it was found on, and more so if that has few tokens. So
thresholds should come from other tokens.
"""

import torch
from torch import Tensor

from teal.calibration.sensitivity import BackwardPass
from teal.calibration.stages import BlockStages, Positions, Stream
from teal.checkpoint.rotation import Rotation, turns_stream
from teal.errors import ParameterError
from teal.model import RMSNorm, Transformer
from teal.progress import progress

WEIGHT_TOKENS = 1024  # tokens of gradients that tell how much a norm matters: one number for each


@torch.inference_mode()
def find_rotation(model: Transformer, sequences: Tensor, offload: bool = False) -> Rotation:
    """The rotation of a dense model in floats, from sequences int64 [N, L] of token ids.

    On the model's device. Of heads alone, if the residual stream cannot be rotated.
    offload: keep activations in host memory. Raises UserError if there are fewer tokens than channels.
    """
    if sequences.numel() < model.config.hidden_size:
        raise ParameterError(
            "{rotate}: {} tokens cannot tell the energy of {} channels; give a longer {text}, or more sequences",
            sequences.numel(), model.config.hidden_size,
        )  # fmt: skip
    c, positions = model.config, Positions(model, sequences.shape[1])
    with_stream = turns_stream(c)
    weights = norm_weights(model, sequences) if with_stream else []
    stream = Stream.embedded(model, sequences, offload)
    residual = torch.zeros(c.hidden_size, c.hidden_size, dtype=torch.float64, device=stream.device)
    heads = []
    for i in progress(range(len(model.blocks)), "measuring covariances", "block"):
        stages = BlockStages(positions, i)
        for p in stages.projections:
            inputs = stages.inputs(p, stream)
            if p.input == "normed" and with_stream:
                residual += weights[i][p.name] * normed_covariance(stream, c.norm_eps)
            elif p.input == "attended":
                heads.append(head_covariances(inputs, c.num_kv_heads, c.head_dim))
            stream = stages.after(p, stream, inputs)
    basis = eigenvectors(residual).float() if with_stream else None
    return Rotation(basis, eigenvectors(torch.stack(heads)).float())


def norm_weights(model: Transformer, sequences: Tensor) -> list[dict[str, float]]:
    """tr(A) of each projection module [layer][name] that reads a norm, of inputs before the norm's weight."""
    backward = BackwardPass(model, sequences, WEIGHT_TOKENS)
    backward.forward()
    found: list[dict[str, float]] = [{} for _ in model.blocks]
    for i in progress(range(len(model.blocks))[::-1], "weighing layers", "block"):
        block, samples = model.blocks[i], backward.samples(i)
        for p in block.projections():
            norm = block.get_submodule(p.norm)
            assert isinstance(norm, RMSNorm)
            scales = norm.weight.float().square()
            found[i][p.name] = sum(
                float(samples[name].gradients.float().square().mean(0) @ scales) if p.input == "normed" else 0.0
                for name in p.names
            )
    return found


def normed_covariance(stream: Stream, eps: float) -> Tensor:
    """E[z z^T] over all tokens of a stream [1, L, C], z = x / rms(x): fp64 [C, C]."""
    total = torch.zeros((stream.parts[0].shape[-1],) * 2, dtype=torch.float64, device=stream.device)
    for part in stream.parts:
        x = part[0].to(stream.device).float()
        z = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        total += z.t() @ z
    return total / sum(part.shape[1] for part in stream.parts)


def head_covariances(stream: Stream, kv_heads: int, head_dim: int) -> Tensor:
    """E[o o^T] of each key/value head over tokens and its query heads, for o [1, L, H D]: fp64 [K, D, D]."""
    total = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64, device=stream.device)
    for part in stream.parts:
        o = part[0].to(stream.device).float().view(part.shape[1], kv_heads, -1, head_dim)
        rows = o.transpose(0, 1).reshape(kv_heads, -1, head_dim)
        total += rows.mT @ rows / rows.shape[1]
    return total / len(stream.parts)


def eigenvectors(covariance: Tensor) -> Tensor:
    """Of symmetric matrices fp64 [..., n, n], as columns, largest eigenvalue first."""
    return torch.linalg.eigh(covariance)[1].flip(-1)
