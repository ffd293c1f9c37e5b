"""`config.json` of a Hugging Face model -> ModelConfig, refusing by name whatever this model.py cannot do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from teal.checkpoint.awq_gptq import Packing
from teal.checkpoint.families import Family, described
from teal.checkpoint.fields import Fields, read_json
from teal.checkpoint.rope_fields import LAYER_TYPES, rope_fields
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig
from teal.model import ModelConfig

MAX_LAYERS = 10_000  # a damaged number must not fill the memory with layers

# What model.py calls the activations that it computes, by their names in config.json.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# Fields that would change the computation, with the values under which they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "num_local_experts": (None, 0),
    "use_bidirectional_attention": (False, None),
    "use_parallel_residual": (False, None),
    "qk_layernorm": (False, None),
}


# A model of a plain family, where only the names of its projections matter: they do not depend on its sizes.
SIZELESS = ModelConfig(
    vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
    max_seq_len=1,
)  # fmt: skip


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
    return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """The architecture that raw, the object of a config.json, describes.

    Raises UserError, with path as the place of raw, for a model this code does not compute.
    """
    fields, family, _ = described(path, raw)
    for field, neutral in NEUTRAL_VALUES.items():
        if field in fields.raw and fields.raw[field] not in neutral:
            raise UserError(f"{path}: {field} {fields.raw[field]!r} is not supported; expected {neutral[0]!r}")
    try:
        return _build(fields, family)
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
    if raw.get("quant_method") == "fp8":
        return None  # read as floats, see layout.py
    if packing := Packing.from_json(raw, str(path)):
        return packing
    config = QuantConfig.from_json(raw, str(path))
    try:
        config.check_fits(load_config(folder))
    except UserError as error:
        raise UserError(f"{path}: quantization_config: {error}") from None
    return config


def _build(raw: Fields, family: Family) -> ModelConfig:
    hidden_size, num_layers = raw.positive("hidden_size"), raw.positive("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise UserError(f"{raw.path}: num_hidden_layers {num_layers} is not usable; expected at most {MAX_LAYERS}")
    num_heads = raw.positive("num_attention_heads")
    head_dim, own = raw.positive("head_dim", default=hidden_size // num_heads), family.fields(raw)
    return ModelConfig(
        vocab_size=raw.positive("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=raw.positive("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=raw.positive("num_key_value_heads", default=num_heads),
        head_dim=head_dim,
        norm_eps=raw.positive(family.eps, float, default=1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        sliding_windows=_sliding_windows(raw, family, num_layers),
        **rope_fields(raw, head_dim, family.partial),
        **({} if "activation" in own else {"activation": _activation(raw)}),
        **own,
    )


def _activation(raw: Fields) -> Any:
    name = raw.get("hidden_activation") or raw.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise UserError(
            f"{raw.path}: hidden_act {name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}"
        )  # fmt: skip
    return ACTIVATIONS[name]


def _sliding_windows(raw: Fields, family: Family, num_layers: int) -> tuple[int | None, ...]:
    ignored = family.windows == "ignored" or (family.windows == "asked for" and not raw.get("use_sliding_window"))
    if ignored or raw.get("sliding_window") is None:
        return (None,) * num_layers
    window, kinds = raw.positive("sliding_window"), raw.get("layer_types")
    if kinds is None:
        return tuple(window if family.slides(raw, i) else None for i in range(num_layers))
    if not isinstance(kinds, list):
        raise raw.bad("layer_types", "a list")
    unknown = [kind for kind in kinds if kind not in LAYER_TYPES]
    if unknown:
        raise UserError(f"{raw.path}: layer_types holds {unknown[0]!r}; expected {' or '.join(LAYER_TYPES)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
