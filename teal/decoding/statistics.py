"""What a generation did: how many tokens, how fast, why it ended."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class GenerationStats:
    """What one generation did. Times in seconds, the first token from when it was asked for; token_s are the gaps between tokens after the first."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    finish_reason: str = ""
    rounds: int = 0  # of drafting and verifying
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        return len(self.token_s) / sum(self.token_s) if self.token_s else None

    def latency_percentile(self, q: float) -> float | None:
        """The q-quantile of the gaps between tokens, seconds."""
        return sorted(self.token_s)[min(len(self.token_s) - 1, int(q * len(self.token_s)))] if self.token_s else None
