"""Tokens, and the logits that a tiny model gives them on both of its ways: a prompt at once, then one by one."""

import torch
from torch import Tensor

from teal.decoding.backend import Backend
from teal.layers.phase import decoding
from teal.model import Transformer

PROMPT = 10  # tokens
SEQUENCES = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: Transformer, tokens: int = 24) -> Tensor:
    """Of a prompt and then one token a call."""
    ids = SEQUENCES[:1, :tokens]
    cache, at = model.new_cache(1, tokens), torch.arange(tokens)[None]
    parts = [model(ids[:, :PROMPT], at[:, :PROMPT], cache)]
    with decoding(model):
        parts += [model(ids[:, i : i + 1], at[:, i : i + 1], cache) for i in range(PROMPT, tokens)]
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def step_logits(backend: Backend, tokens: int = 24) -> Tensor:
    """As logits of a backend's model, of the tokens after the prompt alone, which its steps decode."""
    model = backend.model
    ids, at = SEQUENCES[:1, :tokens].to(model.device), torch.arange(tokens, device=model.device)[None]
    cache = model.new_cache(1, tokens)
    backend.prefill(ids[:, :PROMPT], at[:, :PROMPT], cache)
    parts = []
    for i in range(PROMPT, tokens):
        parts.append(backend.logits(backend.decode(ids[:, i : i + 1].clone(), at[:, i : i + 1].clone(), cache)))
    return torch.cat(parts, dim=1)
