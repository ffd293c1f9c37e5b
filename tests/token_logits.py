"""Tokens, and the logits that a tiny model gives them on both of its ways: a prompt at once, then one by one."""

from collections.abc import Iterator

import torch
from torch import Tensor

from teal.decoding.backend import Backend
from teal.layers.phase import decoding
from teal.model import KVCache, Transformer

PROMPT, TOKENS = 10, 24  # of a prompt, and in all
SEQUENCES = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(model: Transformer, tokens: int = TOKENS) -> Tensor:
    """Of a prompt and then one token a call."""
    ids = SEQUENCES[:1, :tokens]
    cache, at = model.new_cache(1, tokens), torch.arange(tokens)[None]
    parts = [model(ids[:, :PROMPT], at[:, :PROMPT], cache)]
    with decoding(model):
        parts += [model(ids[:, i : i + 1], at[:, i : i + 1], cache) for i in range(PROMPT, tokens)]
    return torch.cat(parts, dim=1)


@torch.inference_mode()
def step_logits(backend: Backend, ids: Tensor, prompt: int = PROMPT) -> tuple[Tensor, KVCache]:
    """Logits [steps, 1, V] of a backend's steps through ids [1, prompt + steps] by the model's own head; and the cache.

    The cache has room for some steps more.
    """
    cache = backend.model.new_cache(1, ids.shape[1] + 8)
    return torch.stack(list(steps(backend, ids, cache, prompt))), cache


@torch.inference_mode()
def steps(backend: Backend, ids: Tensor, cache: KVCache, prompt: int = PROMPT) -> Iterator[Tensor]:
    """The same with a cache, a step when it is asked for: logits [1, V]."""
    backend.prefill(ids[:, :prompt], torch.arange(prompt, device=ids.device)[None], cache)
    for place in range(prompt, ids.shape[1]):
        token, position = ids[:, place : place + 1].clone(), torch.full((1, 1), place, device=ids.device)
        yield backend.logits(backend.decode(token, position, cache)[:, 0])
