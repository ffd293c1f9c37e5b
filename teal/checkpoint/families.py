"""Model families: what their config.json means, and how their checkpoints store what model.py holds. One row for each.

A family that has the shape of another is one row here and one line in tests/checkpoint/test_families.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from teal.checkpoint.fields import Fields

# Names of norms in a layer that mean another norm than Llama's of that name, with the names used here.
GEMMA_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
Fused = dict[str, tuple[str, ...]]
GATE_UP: Fused = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
QKV: Fused = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}


def no_fields(_: Fields) -> dict[str, Any]:
    """Of a plain family."""
    return {}


def never(_: Fields, __: int) -> bool:
    """Of a family whose layers have no windows unless layer_types says so."""
    return False


def always(_: Fields, __: int) -> bool:
    """Of a family all of whose layers have windows."""
    return True


@dataclass(frozen=True, slots=True)
class Family:
    """How a family differs from Llama.

    defaults: what transformers assumes for fields that config.json leaves out. fields: of ModelConfig. windows: whether
    config.json's sliding_window counts. slides: whether it does for layer i, where layer_types is left out. partial:
    whether partial_rotary_factor is known to its computation.

    Of its tensors: norms are other names of norms, fused are several projections in one tensor. norm_offset is added to
    norms. interleaved: whether neighbouring channels of a head turn as a pair. factors: by what tensors of these names
    are multiplied.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    fields: Callable[[Fields], dict[str, Any]] = no_fields
    windows: Literal["ignored", "used", "asked for"] = "ignored"
    slides: Callable[[Fields, int], bool] = never
    partial: bool = False
    norms: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    norm_offset: float = 0.0
    interleaved: bool = False
    factors: Callable[[Fields, int], dict[str, float]] = lambda _, __: {}


def _from_first_window(raw: Fields, i: int) -> bool:
    first = raw.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int):
        raise raw.bad("max_window_layers", "a whole number")
    return i >= first


def _all_but_every(field: str, default: int) -> Callable[[Fields, int], bool]:
    """Windows in all layers but each n-th, with n in this field."""
    return lambda raw, i: (i + 1) % raw.positive(field, default=default) != 0


def _biases(raw: Fields) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias}


def _gemma(raw: Fields) -> dict[str, Any]:
    return {**_biases(raw), "embedding_scale": math.sqrt(raw.positive("hidden_size"))}


def _gemma2(raw: Fields) -> dict[str, Any]:
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {**_gemma(raw), "post_norm": True, **{name: raw.optional(field) for name, field in caps.items()}}


def _query_scale(name: str) -> Callable[[Fields, int], dict[str, float]]:
    """Scores are divided by the root of query_pre_attn_scalar, in place of that of head_dim."""
    return lambda raw, head_dim: {name: math.sqrt(head_dim / raw.positive("query_pre_attn_scalar", float))}


def _granite(raw: Fields) -> dict[str, Any]:
    return {**_biases(raw), "embedding_scale": float(raw.positive("embedding_multiplier", float, 1.0))}


def _granite_factors(raw: Fields, head_dim: int) -> dict[str, float]:
    residual = raw.positive("residual_multiplier", float, 1.0)
    return {
        "self_attn.q_proj": raw.positive("attention_multiplier", float, 1.0) * math.sqrt(head_dim),
        "self_attn.o_proj": residual,
        "mlp.down_proj": residual,
        "model.norm": 1 / raw.positive("logits_scaling", float, 1.0),
    }


def _smollm3(raw: Fields) -> dict[str, Any]:
    return {**_biases(raw), "unrotated_layers": tuple(i for i in _layers(raw) if not _is_rotated(raw, i))}


def _layers(raw: Fields) -> range:
    return range(raw.positive("num_hidden_layers"))


def _is_rotated(raw: Fields, i: int) -> bool:
    """no_rope_layers holds 1 for each layer with a rotation, its name notwithstanding."""
    listed = raw.get("no_rope_layers")
    if listed is None:
        return (i + 1) % raw.positive("no_rope_layer_interval", default=4) != 0
    if not (isinstance(listed, list) and len(listed) == len(_layers(raw)) and all(v in (0, 1) for v in listed)):
        raise raw.bad("no_rope_layers", "0 or 1 for each layer")
    return bool(listed[i])


def _olmo2(raw: Fields) -> dict[str, Any]:
    return {**_biases(raw), "pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_full": True}


GEMMA_DEFAULTS = {
    "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "num_key_value_heads": 4,
}  # fmt: skip
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | {"query_pre_attn_scalar": 256, "sliding_window": 4096}
GLM = Family(
    {"head_dim": 128, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07,
     "attention_bias": True, "max_position_embeddings": 131072},
    lambda raw: {"qkv_bias": bool(raw.get("attention_bias"))},
    partial=True, fused=GATE_UP, interleaved=True,
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": Family(fields=_biases),
    "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8}, _biases, "used", always),
    "ministral": Family({"sliding_window": 4096, "num_key_value_heads": 8}, _biases, "used", always),
    "ministral3": Family(
        {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144},
        windows="used", slides=always,
    ),
    "qwen2": Family(
        {"sliding_window": 4096, "max_window_layers": 28},
        lambda _: {"qkv_bias": True}, "asked for", _from_first_window,
    ),
    "qwen3": Family(
        {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
        lambda raw: {**_biases(raw), "qk_norm": True}, "asked for", _from_first_window,
    ),
    "gemma": Family(
        {**GEMMA_DEFAULTS, "num_key_value_heads": 16, "max_position_embeddings": 8192},
        lambda raw: {**_gemma(raw), "activation": "gelu_tanh"},  # old files say gelu and mean this
        norm_offset=1.0,
    ),
    "gemma2": Family(
        {**GEMMA2_DEFAULTS, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
         "final_logit_softcapping": 30.0},
        _gemma2, "used", lambda _, i: i % 2 == 0,
        norms=GEMMA_NORMS, norm_offset=1.0, factors=_query_scale("self_attn.q_proj"),
    ),
    "gemma3_text": Family(
        {**GEMMA2_DEFAULTS, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
         "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8},  # all, for text parts of larger models list only what differs
        lambda raw: {**_gemma2(raw), "qk_norm": True},
        "used", _all_but_every("sliding_window_pattern", 6),
        norms=GEMMA_NORMS, norm_offset=1.0, factors=_query_scale("self_attn.q_norm"),
    ),
    "granite": Family(fields=_granite, factors=_granite_factors),
    "olmo2": Family({"rms_norm_eps": 1e-5}, _olmo2, norms={
        "post_attention_layernorm": "post_self_attn_layernorm", "post_feedforward_layernorm": "post_mlp_layernorm",
    }),
    "smollm3": Family(
        {"tie_word_embeddings": True, "rope_theta": 2e6, "num_key_value_heads": 4, "max_position_embeddings": 32768},
        _smollm3, "asked for", lambda raw, i: not _is_rotated(raw, i),
    ),
    "phi3": Family(
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}, windows="used", slides=always,
        partial=True, fused=QKV | GATE_UP,
    ),
    "glm": GLM,
    "glm4": Family(
        GLM.defaults, lambda raw: {**GLM.fields(raw), "post_norm": True}, partial=True, fused=GATE_UP, interleaved=True
    ),
}  # fmt: skip
# Of models that also see or hear: the family of their text part, where text_config does not say.
MULTIMODAL = {"gemma3": "gemma3_text", "mistral3": "mistral"}
