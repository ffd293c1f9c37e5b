"""How to generate: sampling parameters and counts, each with its one default. Imports nothing heavy."""

import math
from dataclasses import dataclass, replace

from errors import UserError

DEFAULT_MAX_NEW_TOKENS = 256
COUNTED_TOKENS = 32  # of an answer, to say what sparsity drops: shares of thousands of entries each
LOOKUP_LENGTH = 8  # tokens drafted at once by lookup
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
    def takes_likeliest(self) -> bool:
        """Whether the token is always the likeliest one."""
        return self.is_greedy and self.repetition_penalty == 1

    def without_seed(self) -> "SamplingParams":
        """Equal for parameters that run the same computation: the seed lives in the generator."""
        return replace(self, seed=0)
