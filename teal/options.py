"""How to generate: sampling parameters and counts, each with its one default. Imports nothing heavy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from teal.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 256
COUNTED_TOKENS = 32  # of an answer, to say what sparsity drops: shares of thousands of entries each
LOOKUP_LENGTH = 8  # tokens drafted at once by lookup
MAX_DRAFT = 16  # tokens drafted at once at most
MIN_TEMPERATURE = 1e-5  # below it fp32 logits would be divided to infinity, and only the largest has a share anyway
MAX_BIAS = 100.0  # of logit_bias: OpenAI's range
MAX_PENALTY = 2.0  # of presence and frequency, in size: OpenAI's range
KV_CACHES = ("float", "int8")  # how keys and values are kept; the first is the default


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick a token. temperature or top_p 0 is greedy.

    Off are: top_k 0 or -1, top_p and repetition_penalty 1, min_p, presence_penalty and frequency_penalty 0.
    presence_penalty is taken once from the logit of each generated token, frequency_penalty for each time that it was
    generated. logit_bias maps token ids to what is added to their logits: -100 bans a token, 100 leaves only tokens
    at 100 (OpenAI's meaning of these three); it is kept as sorted pairs.
    They apply in the order presence, frequency, bias, repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UserError(f"{name} {getattr(self, name)} is out of range; expected {expected}")

        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0 (0 is greedy)")
        require(self.top_k >= -1, "top_k", "a whole number >= -1 (0 and -1 are off)")
        require(0 <= self.top_p <= 1, "top_p", "0 <= top_p <= 1 (1 is off, 0 is greedy)")
        require(0 <= self.min_p < 1, "min_p", "0 <= min_p < 1 (0 is off)")
        penalty = self.repetition_penalty
        require(math.isfinite(penalty) and penalty > 0, "repetition_penalty", "a number > 0 (1 is off)")
        require(0 <= self.seed < 2**63, "seed", "0 <= seed < 2^63")
        for name in ("presence_penalty", "frequency_penalty"):
            require(abs(getattr(self, name)) <= MAX_PENALTY, name, f"-{MAX_PENALTY:g} to {MAX_PENALTY:g} (0 is off)")
        object.__setattr__(self, "logit_bias", tuple(sorted(self.biases.items())))
        for token, bias in self.biases.items():
            if token < 0 or not abs(bias) <= MAX_BIAS:
                raise UserError(
                    f"logit_bias {token}: {bias} is out of range; expected token ids and -{MAX_BIAS:g} to {MAX_BIAS:g}"
                )

    @property
    def biases(self) -> dict[int, float]:
        """logit_bias by token id."""
        return dict(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: the token is the argmax of the logits after penalties."""
        return self.temperature < MIN_TEMPERATURE or self.top_p == 0

    @property
    def is_argmax(self) -> bool:
        """Whether the token is always the argmax of the model's own logits."""
        return self.is_greedy and self.repetition_penalty == 1 and not self.counts_or_biases

    @property
    def counts_or_biases(self) -> bool:
        """Whether the logits change by what was generated, counted, or by token."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)

    def without_seed(self) -> "SamplingParams":
        """Equal for parameters that run the same computation: the seed lives in the generator."""
        return replace(self, seed=0)


def check_prompt(prompt_ids: list[int], limit: int) -> None:
    """Raise UserError unless a context of limit tokens has room for the prompt and one token more."""
    if not prompt_ids:
        raise UserError("the prompt is empty; give at least one token of text")
    if len(prompt_ids) >= limit:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens; the context of {limit} must exceed it")


def check_length(length: int) -> None:
    """Raise UserError unless so many tokens can be drafted in a round."""
    if not 1 <= length <= MAX_DRAFT:
        raise UserError(f"--speculate {length} is out of range; expected 1 to {MAX_DRAFT}")
