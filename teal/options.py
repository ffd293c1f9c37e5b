"""How to generate: sampling parameters and counts, each with its one default. Imports nothing heavy."""

import math
from dataclasses import dataclass, replace

from teal.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 256
COUNTED_TOKENS = 32  # of an answer, to say what sparsity drops: shares of thousands of entries each
LOOKUP_LENGTH = 8  # tokens drafted at once by lookup
MAX_DRAFT = 16  # tokens drafted at once at most
MIN_TEMPERATURE = 1e-5  # below it fp32 logits would be divided to infinity, and only the largest has a share anyway
KV_CACHES = ("float", "int8")  # how keys and values are kept; the first is the default


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick a token. temperature or top_p 0 is greedy.

    Off are: top_k 0 or -1, top_p and repetition_penalty 1, min_p 0.

    Filters apply in the order repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

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

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: the token is the argmax of the logits after penalties."""
        return self.temperature < MIN_TEMPERATURE or self.top_p == 0

    @property
    def is_argmax(self) -> bool:
        """Whether the token is always the likeliest one."""
        return self.is_greedy and self.repetition_penalty == 1

    def without_seed(self) -> "SamplingParams":
        """Equal for parameters that run the same computation: the seed lives in the generator."""
        return replace(self, seed=0)


def check_prompt(prompt_ids: list[int], limit: int) -> None:
    """Raise UserError unless a context of limit tokens has room for the prompt and one token more."""
    if not prompt_ids:
        raise UserError("the prompt is empty; give at least one token of text")
    if len(prompt_ids) >= limit:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens; this model's context of {limit} must exceed it")


def check_length(length: int) -> None:
    """Raise UserError unless so many tokens can be drafted in a round."""
    if not 1 <= length <= MAX_DRAFT:
        raise UserError(f"--speculate {length} is out of range; expected 1 to {MAX_DRAFT}")
