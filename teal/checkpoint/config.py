"""`config.json` of a Hugging Face folder -> ModelConfig, refusing by name whatever this model.py cannot do."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teal.checkpoint.awq_gptq import Packing
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig
from teal.model import ModelConfig, RopeScaling
from teal.user_text import is_number, parse_json

MAX_LAYERS = 10_000  # a damaged number must not fill the memory with layers
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# What transformers assumes where config.json leaves a field out, if the families differ.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}

# Fields that would change the computation, with the values under which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "num_local_experts": (None, 0),
}


# A model of a plain family, where only the names of its projections matter: they do not depend on its sizes.
SIZELESS = ModelConfig(
    vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
    max_seq_len=1,
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file if it is missing, unreadable or holds no object."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint folder must hold it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a JSON object")
    return content


def _is_token(value: Any) -> bool:
    """A special token is a string, or an object with its text in content."""
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_template(value: Any) -> bool:
    """A chat template is a string, or a list of named ones."""
    entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
    return all(isinstance(e, dict) and all(isinstance(e.get(n), str) for n in ("name", "template")) for e in entries)


# Fields that tokenizer.py reads from the three configs of a folder: what they may be, and how to say so.
TOKENIZER_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), (_is_token, "a string")),
    "bos_token_id": (_is_id, "a token id"),
    "eos_token_id": (lambda value: all(map(_is_id, value if isinstance(value, list) else [value])), "token ids"),
    "add_bos_token": (lambda value: isinstance(value, bool), "true or false"),
    "chat_template": (_is_template, "a string or a list of named ones"),
}


def read_tokenizer_settings(path: Path) -> dict[str, Any]:
    """The object in one of those files, {} if there is none. Raises UserError for a field of an unusable kind."""
    content = read_json(path) if path.exists() else {}
    for name, (is_usable, expected) in TOKENIZER_FIELDS.items():
        if (value := content.get(name)) is not None and not is_usable(value):
            raise UserError(f"{path}: {name} {value!r:.200} is not usable; expected {expected}")
    return content


def load_config(folder: Path) -> ModelConfig:
    """The architecture described by folder/config.json. Raises UserError for a model this code does not compute."""
    path = folder / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}")
    raw = {**FAMILY_DEFAULTS[family], **raw}
    for field, neutral in NEUTRAL_VALUES.items():
        if field in raw and raw[field] not in neutral:
            raise UserError(f"{path}: {field} {raw[field]!r} is not supported; expected {neutral[0]!r}")
    try:
        return _build(path, family, raw)
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: {error}") from error


def load_quantization(folder: Path) -> QuantConfig | Packing | None:
    """How the folder's weights are quantized, None if they are not. Raises UserError for a scheme unknown here."""
    path = folder / "config.json"
    raw = read_json(path).get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: quantization_config {raw!r} is not usable; expected an object")
    if packing := Packing.from_json(raw, str(path)):
        return packing
    config = QuantConfig.from_json(raw, str(path))
    try:
        config.check_fits(load_config(folder))
    except UserError as error:
        raise UserError(f"{path}: quantization_config: {error}") from None
    return config


def _positive(
    path: Path, raw: dict[str, Any], field: str, kind: type[int] | type[float] = int, default: Any = None
) -> Any:
    value = raw.get(field)
    value = default if value is None else value
    if not (is_number(value) and isinstance(value, (int, kind)) and 0 < value < math.inf):
        raise UserError(f"{path}: {field} {value!r:.200} is not usable; expected a positive {kind.__name__}")
    return value


def _build(path: Path, family: str, raw: dict[str, Any]) -> ModelConfig:
    hidden_size = _positive(path, raw, "hidden_size")
    num_layers = _positive(path, raw, "num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise UserError(f"{path}: num_hidden_layers {num_layers} is not usable; expected at most {MAX_LAYERS}")
    num_heads = _positive(path, raw, "num_attention_heads")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, or 4
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters {rope!r} is not usable; expected an object")
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        vocab_size=_positive(path, raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(path, raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_positive(path, raw, "num_key_value_heads", default=num_heads),
        head_dim=_positive(path, raw, "head_dim", default=hidden_size // num_heads),
        max_seq_len=_positive(path, raw, "max_position_embeddings", default=2048),
        norm_eps=_positive(path, raw, "rms_norm_eps", float, default=1e-6),
        rope_theta=_positive(path, {**raw, **rope}, "rope_theta", float, default=10000.0),
        rope_scaling=_rope_scaling(path, rope),
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        sliding_windows=_sliding_windows(path, family, raw, num_layers),
    )


def _rope_scaling(path: Path, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{path}: rope_scaling type {kind!r} is not supported; expected default, linear or llama3")
    if kind == "linear":
        return RopeScaling(kind, _positive(path, rope, "factor", float))
    return RopeScaling(
        kind,
        factor=_positive(path, rope, "factor", float),
        low_freq_factor=_positive(path, rope, "low_freq_factor", float),
        high_freq_factor=_positive(path, rope, "high_freq_factor", float),
        original_max_position_embeddings=_positive(path, rope, "original_max_position_embeddings"),
    )


def _sliding_windows(path: Path, family: str, raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if family == "llama" or window is None:
        return (None,) * num_layers
    window = _positive(path, raw, "sliding_window")
    if family == "mistral":
        return (window,) * num_layers
    if not raw.get("use_sliding_window", False):
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw["max_window_layers"]
        if isinstance(first, bool) or not isinstance(first, int):
            raise UserError(f"{path}: max_window_layers {first!r} is not usable; expected a whole number")
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if not isinstance(kinds, list):
        raise UserError(f"{path}: layer_types {kinds!r} is not usable; expected a list")
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown:
        raise UserError(f"{path}: layer_types holds {unknown[0]!r}; expected full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
