"""What a caller may choose: the model, drafts, sampling, calibration, counts. Each default stands here, once.

Imports nothing heavy, so that a command line can take its defaults and choices from here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from numbers import Integral
from typing import Any

from teal.architectures import ARCHITECTURES
from teal.errors import ParameterError, UserError

DEFAULT_MAX_NEW_TOKENS = 256
COUNTED_TOKENS = 32  # of an answer, to say what sparsity drops: shares of thousands of entries each
MAX_ROWS = 8  # of a decode step: with more, nearly every channel is kept by some row, and a dense product is faster
DEFAULT_QUEUE = 128  # requests that may wait for a row
LOOKUP_LENGTH = 8  # tokens drafted at once by lookup
MAX_DRAFT = 16  # tokens drafted at once at most
MIN_TEMPERATURE = 1e-5  # below it fp32 logits would be divided to infinity, and only the largest has a share anyway
MAX_BIAS = 100.0  # of logit_bias: OpenAI's range
MAX_PENALTY = 2.0  # of presence and frequency, in size: OpenAI's range
DTYPE_NAMES = ("auto", "bf16", "fp16", "fp32")
QUANTS = ("int8", "int4")  # what weights may be rounded to at load
KV_CACHES = ("float", "int8")  # how keys and values are kept
BACKENDS = ("auto", "eager", "compiled", "fused", "program")  # what runs a decode step
MAX_THREADS = 1024  # of a process's own
MAX_RANKS = 64  # devices that share a model
MAX_CPU_RANKS = 8  # processes that do so on a CPU, to try it: each takes some 0.5 GB beside weights
# In the environment of the processes that do, as torchrun sets them: which one, of how many, and on this machine.
RANK, RANKS, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
CALIBRATION_SEQUENCES, CALIBRATION_LENGTH = 10, 2048  # of tokens: the paper's calibration set
METHODS = ("uniform", "greedy", "global")  # of calibration
# Share of the tokens of a call that are sparse. "decode" is what a user's generated tokens get. "half" is the paper's
# evaluation (section 5.1), where the first half of each window is dense, like a prompt.
POLICY_SHARES = {"decode": 1.0, "half": 0.5}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model to load, and how it is to decode. Raises UserError for what no model could satisfy.

    checkpoint: a folder, a .gguf file or a hub id (source.resolve_checkpoint), None for the default model;
    random_weights: a known architecture instead. adapter: a LoRA adapter's folder or hub id, merged into the
    checkpoint. sparsity: the share of activations to drop, plan: a plan file instead.
    compile None means on CUDA only, backend "auto" what suits device, dtype and formats. quant ("int8", "int4") rounds
    the weights at load, quant_lm_head those of the output head, to the same or other bits. kv_cache "int8" keeps keys
    and values in 8 bits. threads: how many a CPU computes with, in the whole process. None is the cores that affinity
    and quota allow (teal.environment). dequantize makes floats of a GGUF file's integers, which a CPU else multiplies
    as they are. force_plan takes plans that were made for other weights. tensor_parallel: how many devices share the
    model, each in a process of its own that runs the same program (teal/layers/team.py).
    """

    checkpoint: str | None = None
    _: KW_ONLY
    random_weights: str | None = None
    adapter: str | None = None
    sparsity: float = 0.0
    plan: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    compile: bool | None = None
    backend: str = BACKENDS[0]
    quant: str | None = None
    quant_lm_head: str | None = None
    kv_cache: str = KV_CACHES[0]
    threads: int | None = None
    dequantize: bool = False
    force_plan: bool = False
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.random_weights is not None:
            raise ParameterError("{checkpoint} does not go with {random_weights}; choose one")
        if self.adapter is not None and self.random_weights is not None:
            raise ParameterError("{adapter} does not go with {random_weights}; give the checkpoint it was trained on")
        if self.random_weights is not None:
            check_architecture(self.random_weights)
        check_sparsity(self.sparsity)
        if self.sparsity > 0 and self.plan is not None:
            raise ParameterError("{plan} does not go with {sparsity}, which the plan has; choose one")
        check_device(self.device)
        check_choice("dtype", self.dtype, DTYPE_NAMES)
        check_choice("backend", self.backend, BACKENDS)
        if self.quant is not None:
            check_choice("quant", self.quant, QUANTS)
        elif self.quant_lm_head is not None:
            raise ParameterError("{quant_lm_head} goes with {quant}; to keep the rest in floats is not supported")
        if self.quant_lm_head is not None:
            check_choice("quant_lm_head", self.quant_lm_head, QUANTS)
        check_choice("kv_cache", self.kv_cache, KV_CACHES)
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise ParameterError(f"{{threads}} {{}} is out of range; expected 1 to {MAX_THREADS}", self.threads)
        if not 1 <= self.tensor_parallel <= MAX_RANKS:
            raise ParameterError(
                f"{{tensor_parallel}} {{}} is out of range; expected 1 to {MAX_RANKS}", self.tensor_parallel
            )

    @property
    def is_sparse(self) -> bool:
        """Whether the model is to run by the sparse kernels."""
        return self.sparsity > 0 or self.plan is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions:
    """How to draft for speculative decoding. Raises UserError.

    length: tokens drafted at once at most. The draft is the model with this sparsity or the plan of a file; quant
    rounds its weights, and no others. checkpoint: a folder that quantize.py made of the same model, to draft with its
    weights. With lookup the draft is what followed the last few tokens where they stood before.
    """

    length: int = LOOKUP_LENGTH
    sparsity: float = 0.5
    plan: str | None = None
    quant: str | None = None
    checkpoint: str | None = None
    lookup: bool = False

    def __post_init__(self) -> None:
        check_length(self.length)
        if self.quant is not None:
            check_choice("draft_quant", self.quant, QUANTS)
        if self.lookup:
            self._check_lookup()
        elif self.quant is not None and self.checkpoint is not None:
            raise ParameterError("{draft_quant} does not go with {draft_checkpoint}, which is rounded; choose one")
        elif self.plan is None and not (0 < self.sparsity < 1 or (self.sparsity == 0 and self.has_own_weights)):
            raise ParameterError(
                "{draft_sparsity} {:g} is out of range; expected 0 < sparsity < 1, or 0 of rounded weights",
                self.sparsity,
            )

    def _check_lookup(self) -> None:
        given = {"draft_plan": self.plan, "draft_quant": self.quant, "draft_checkpoint": self.checkpoint}
        for name, value in given.items():
            if value is not None:
                raise ParameterError(f"{{{name}}} does not go with {{draft_lookup}}, which runs no model")

    @property
    def has_own_weights(self) -> bool:
        """Whether the draft's weights are others than the model's."""
        return self.quant is not None or self.checkpoint is not None


@dataclass(frozen=True, slots=True)
class Settings:
    """What to calibrate: sparsities to reach, and how to spread them. Raises UserError.

    method "uniform", "greedy" or "global"; step: of greedy, the average sparsity that a projection gains.
    gradient_tokens: of global, how many tokens gradients are taken of.
    """

    targets: tuple[float, ...] = (0.5,)
    method: str = METHODS[-1]
    step: float = 0.05
    # What each token drops meets its own gradient, which scatters: RESULTS.md's figures are from so many tokens.
    gradient_tokens: int = 16384

    def __post_init__(self) -> None:
        for target in self.targets:
            check_sparsity(target)
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown; expected one of {', '.join(METHODS)}")
        if not 0 < self.step <= 0.5:
            raise ParameterError("{step} {} is out of range; expected 0 < step <= 0.5", self.step)


def _described(default: Any, meaning: str) -> Any:
    """A field with what a command line says of it."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick a token. temperature or top_p 0 is greedy.

    Off are: top_k 0 or -1, top_p and repetition_penalty 1, min_p, presence_penalty and frequency_penalty 0.
    presence_penalty is taken once from the logit of each generated token, frequency_penalty for each time that it was
    generated. logit_bias maps token ids to what is added to their logits: -100 bans a token, 100 leaves only tokens at
    100. It is kept as sorted pairs. These three mean what OpenAI's do. All apply in the order presence, frequency,
    bias, repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = _described(0.0, "0 is greedy")
    top_k: int = _described(0, "keep the k most probable tokens; 0 is off")
    top_p: float = _described(1.0, "keep the most probable tokens that hold p of the mass; 1 is off")
    min_p: float = _described(0.0, "drop tokens below p x the best; 0 is off")
    repetition_penalty: float = _described(1.0, "1 is off")
    seed: int = _described(0, "same seed, same machine: same text")
    presence_penalty: float = _described(0.0, "taken once from the logit of each generated token; -2 to 2, 0 is off")
    frequency_penalty: float = _described(0.0, "taken each time that a token was generated; -2 to 2, 0 is off")
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ParameterError(f"{{{name}}} {{}} is out of range; expected {expected}", getattr(self, name))

        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0 (0 is greedy)")
        require(self.top_k >= -1, "top_k", "a whole number >= -1 (0 and -1 are off)")
        require(0 <= self.top_p <= 1, "top_p", "0 <= top_p <= 1 (1 is off, 0 is greedy)")
        require(0 <= self.min_p < 1, "min_p", "0 <= min_p < 1 (0 is off)")
        penalty = self.repetition_penalty
        require(math.isfinite(penalty) and penalty > 0, "repetition_penalty", "a number > 0 (1 is off)")
        require(0 <= self.seed < 2**63, "seed", "0 <= seed < 2^63")
        for name in ("presence_penalty", "frequency_penalty"):
            require(abs(getattr(self, name)) <= MAX_PENALTY, name, f"-{MAX_PENALTY:g} to {MAX_PENALTY:g} (0 is off)")
        for token, bias in self.biases.items():
            if not isinstance(token, Integral) or token < 0 or not abs(bias) <= MAX_BIAS:
                raise ParameterError(
                    f"{{logit_bias}} {{}}: {{}} is out of range; expected token ids and -{MAX_BIAS:g} to {MAX_BIAS:g}",
                    token, bias,
                )  # fmt: skip
        object.__setattr__(self, "logit_bias", tuple(sorted(self.biases.items())))

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
    if isinstance(prompt_ids, str):
        raise UserError("the prompt is a text; give its token ids, as engine.tokenizer.encode(text) does")
    if not prompt_ids:
        raise UserError("the prompt is empty; give at least one token of text")
    if len(prompt_ids) >= limit:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens; the context of {limit} must exceed it")


def check_length(length: int) -> None:
    """Raise UserError unless so many tokens can be drafted in a round."""
    if not 1 <= length <= MAX_DRAFT:
        raise ParameterError(f"{{draft_length}} {{}} is out of range; expected 1 to {MAX_DRAFT}", length)


def unknown_id(ids: Iterable[int], vocab_size: int) -> int | None:
    """The first of ids that a model of so many tokens does not have; None if it has all."""
    return next((i for i in ids if not 0 <= i < vocab_size), None)


def check_ids(prompt_ids: list[int], vocab_size: int) -> None:
    """Raise UserError if a prompt has a token that the model does not have."""
    if (token := unknown_id(prompt_ids, vocab_size)) is not None:
        raise UserError(f"the prompt has token id {token}; expected 0 to {vocab_size - 1}")


def check_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raise UserError if logit_bias names a token that the model does not have."""
    if (token := unknown_id(params.biases, vocab_size)) is not None:
        raise ParameterError("{logit_bias} {}: no such token; this model has {}", token, vocab_size)


def check_sparsity(sparsity: float) -> None:
    """Raise UserError unless it is a share of activations that can be dropped."""
    if not 0 <= sparsity < 1:
        raise ParameterError("{sparsity} {} is out of range; expected 0 <= sparsity < 1", sparsity)


def check_speculation(model: ModelOptions) -> None:
    """Raise UserError if the model is to be sparse: what speculative decoding gives is the dense model's text."""
    for name, given in (("sparsity", model.sparsity > 0), ("plan", model.plan is not None)):
        if given:
            raise ParameterError(f"{{{name}}} does not go with speculative decoding, whose text is the dense model's")


def check_device(device: str) -> None:
    """Raise UserError unless it is the name of a device, which this machine may lack."""
    if not DEVICE.fullmatch(device):
        raise ParameterError("{device} {}: unknown device; expected cpu, cuda or cuda:N", device)


def check_architecture(name: str, parameter: str = "random_weights") -> str:
    """The known architecture of this name, whatever its case, spelled as it is known. Raises UserError."""
    for known in ARCHITECTURES:
        if known.lower() == name.lower():
            return known
    raise ParameterError(f"{{{parameter}}} {{}}: unknown; expected one of {', '.join(ARCHITECTURES)}", name)


def check_choice(parameter: str, value: str, known: tuple[str, ...]) -> None:
    """Raise UserError unless a parameter's value is among those known."""
    if value not in known:
        raise ParameterError(f"{{{parameter}}} {{}}: unknown; expected one of {', '.join(known)}", value)
