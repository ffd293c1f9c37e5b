"""Logits -> next token, on the device and without a host synchronisation, so that a CUDA graph can hold it."""

import math

import torch
from torch import Tensor

from teal.options import MAX_BIAS, SamplingParams

FORCED = 1e4  # beyond any logit and penalty


def sample(logits: Tensor, params: SamplingParams, seen: Tensor, generator: torch.Generator | None) -> Tensor:
    """Next token of each row: logits [B, V] -> int64 [B].

    seen: bool [B, V], the tokens of prompt and output so far, read by the repetition penalty.
    """
    if params.is_argmax:
        return logits.argmax(dim=-1)
    if params.is_greedy:
        return _penalized(logits, params, seen).argmax(dim=-1)
    return draw(probabilities(logits, params, seen), generator)


def probabilities(logits: Tensor, params: SamplingParams, seen: Tensor) -> Tensor:
    """What sample draws from: fp32 [B, V]; all of it on the argmax where params are greedy."""
    logits = _penalized(logits, params, seen)
    if params.is_greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    return filter_logits(logits / params.temperature, params).softmax(dim=-1)


def _penalized(logits: Tensor, params: SamplingParams, seen: Tensor) -> Tensor:
    logits = logits.float()
    return logits if params.repetition_penalty == 1 else penalize(logits, params.repetition_penalty, seen)


def draw(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index of each row of weights >= 0 [B, V], with a probability in proportion: int64 [B].

    argmax(w / e) with e ~ Exponential(1): the Gumbel trick, without multinomial's sync.
    """
    noise = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / noise.clamp_min_(1e-30)).argmax(dim=-1)


def argmax_step(logits: Tensor, token: Tensor, position: Tensor) -> None:
    """Write the argmax of each row of logits [B, V] into token [B, 1] and add 1 to position [B, 1]."""
    if logits.is_cuda:
        from teal.kernels.argmax import argmax_step as kernel  # needs Triton, which a CPU does not

        kernel(logits, token, position)
    else:
        token.copy_(logits.argmax(dim=-1, keepdim=True))
        position += 1


def penalize(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by penalty (Keskar et al. 2019, section 4.1)."""
    return logits.where(~seen, torch.where(logits > 0, logits / penalty, logits * penalty))


def penalize_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """logits [B, V] less presence for each generated token and frequency times its count (OpenAI's penalties)."""
    return logits - presence * (counts > 0) - frequency * counts


def bias_row(bias: dict[int, float], size: int, device: torch.device) -> Tensor:
    """OpenAI's logit_bias as fp32 [1, V] to add to logits: -100 bans a token, 100 leaves only tokens at 100.

    The others lose FORCED instead of the forced gaining it: a grammar that allows no forced token still has its choice.
    """
    row = torch.zeros(1, size, device=device)
    if bias:
        ids, values = torch.tensor(list(bias), device=device), torch.tensor(list(bias.values()), device=device)
        row[0, ids] = values.where(values > -MAX_BIAS, -math.inf)
        if (forced := ids[values >= MAX_BIAS]).numel():
            row -= FORCED
            row[0, forced] = 0
    return row


def filter_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits [B, V] with -inf for what top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) exclude."""
    off = -math.inf
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, off)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(dim=-1)
        beyond = probs.cumsum(dim=-1) - probs >= params.top_p  # the token that crosses top_p stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), off)
    if params.min_p > 0:
        probs = logits.softmax(dim=-1)
        logits = logits.masked_fill(probs < params.min_p * probs.amax(dim=-1, keepdim=True), off)
    return logits
