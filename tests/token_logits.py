"""Tokens, and the logits that a tiny model gives them on both of its ways: a prompt at once, then one by one."""

import torch
from torch import Tensor

from teal.layers.phase import decoding
from teal.model import Transformer

SEQUENCES = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: Transformer, tokens: int = 24) -> Tensor:
    """Of a prompt of 10 tokens and then one token a call."""
    ids = SEQUENCES[:1, :tokens]
    cache, at = model.new_cache(1, tokens), torch.arange(tokens)[None]
    parts = [model(ids[:, :10], at[:, :10], cache)]
    with decoding(model):
        parts += [model(ids[:, i : i + 1], at[:, i : i + 1], cache) for i in range(10, tokens)]
    return torch.cat(parts, dim=1)
