"""Random weights of GGUF's block types, and tiny models whose projections, head and embedding have them."""

from collections.abc import Mapping

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from teal.checkpoint.blocks import use_block_modules
from teal.kernels.formats.blocks import BLOCK_TYPES, Blocks, pack
from teal.layers.block_linear import BlockShape, BlockWeight
from teal.model import ModelConfig, Transformer

KINDS = tuple(BLOCK_TYPES)


def random_rows(kind: str, N: int, K: int, seed: int = 0, scale: float = 1e-2) -> np.ndarray:
    """Blocks of a GGUF tensor [N, K] as its file has them, uint8: bits at random, scales around so large."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    raw = rng.integers(0, 256, (N * K // block, size), dtype=np.uint8)
    scales = (rng.uniform(0.5, 1, (len(raw), 2)) * scale).astype(np.float16)
    if BLOCK_TYPES[kind].nested:
        scales /= 32  # times sub-scales
    minima = -scales[:, 1] * (1 << BLOCK_TYPES[kind].bits - 1)  # of Q4_1 and Q5_1: weights around zero
    found = scales.copy() if BLOCK_TYPES[kind].nested else np.stack((scales[:, 0], minima), 1)
    count = 2 if BLOCK_TYPES[kind].has_minima else 1
    at = size - 2 if kind == "Q6_K" else 0
    raw[:, at : at + 2 * count] = np.ascontiguousarray(found[:, :count]).view(np.uint8)
    return raw.reshape(N, -1)


def floats_of(kind: str, rows: np.ndarray) -> Tensor:
    """What the gguf package makes of such a tensor: fp32 [N, K]."""
    return torch.from_numpy(np.array(gguf.dequantize(rows, Type[kind])))


def random_blocks(kind: str, K: int, N: int, seed: int = 0, scale: float = 1e-2) -> Blocks:
    return pack(kind, torch.from_numpy(random_rows(kind, N, K, seed, scale)))


def use_random_blocks(model: Transformer, kinds: Mapping[str, str], scale: float) -> None:
    """Give model weights in blocks: kinds has a type for each projection that is to have one, "embedding", "head"."""
    shapes = {name: BlockShape(kinds[short], K, N) for name, short, K, N in _weights(model.config) if short in kinds}
    use_block_modules(model, shapes, "model.layers.{}.".format)
    filled: set[int] = set()
    for module in model.modules():
        if isinstance(module, BlockWeight) and id(module) not in filled:
            filled.add(id(module))
            for seed, (data, shape) in enumerate(zip(module.data, module.shapes, strict=True), len(filled)):
                data.copy_(random_blocks(*shape, seed=seed, scale=scale).data)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embedding.weight


def _weights(config: ModelConfig) -> list[tuple[str, str, int, int]]:
    """(tensor, short name, K, N) of all weights."""
    found = [
        (f"model.layers.{i}.{hf_name}.weight", name, p.in_features, N)
        for i in range(config.num_layers)
        for p in config.projections()
        for hf_name, name, N in zip(p.hf_names, p.names, p.sizes, strict=True)
    ]
    ends = (("model.embed_tokens.weight", "embedding"), ("lm_head.weight", "head"))
    return [*found, *((name, short, config.hidden_size, config.vocab_size) for name, short in ends)]
