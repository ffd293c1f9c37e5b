"""What a config.json says of rotary embeddings, in the fields of transformers 4 and 5 -> fields of ModelConfig."""

import math
from typing import Any

from teal.checkpoint.fields import Fields
from teal.errors import UserError
from teal.rope import RopeScaling

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
OLD_NAMES = {"su": "longrope"}
LAYER_TYPES = ("full_attention", "sliding_attention")


def rope_fields(raw: Fields, head_dim: int, partial: bool) -> dict[str, Any]:
    """Also max_seq_len, which some scalings set. partial: whether the family knows partial_rotary_factor.

    Raises UserError for a scaling that is unknown.
    """
    rope, local = _by_layer_type(raw)
    longest = raw.positive("max_position_embeddings", default=2048)
    turned = _turned(raw, rope, head_dim, partial)
    scaling, length = _scaling(raw, rope, turned or head_dim, longest)
    theta = rope.positive("rope_theta", float, raw.positive("rope_theta", float, 10000.0))
    result = {"rope_theta": theta, "rope_scaling": scaling, "rotary_dim": turned, "max_seq_len": length}
    if local is not None:
        if (kind := _kind(local)) != "default":
            raise UserError(f"{raw.path}: rope type {kind!r} of layers with windows is not supported; expected default")
        result["local_rope_theta"] = local.positive("rope_theta", float, raw.get("rope_local_base_freq"))
    return result


def _by_layer_type(raw: Fields) -> tuple[Fields, Fields | None]:
    """The parameters of a rotation, and those of layers with a window where they have others."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"  # transformers 5, or 4
    rope = raw.object(name)
    if any(kind in rope.raw for kind in LAYER_TYPES):
        return rope.object(LAYER_TYPES[0]), rope.object(LAYER_TYPES[1])
    return rope, None if raw.get("rope_local_base_freq") is None else Fields(raw.path, {})


def _kind(rope: Fields) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind


def _turned(raw: Fields, rope: Fields, head_dim: int, partial: bool) -> int | None:
    """How many channels of a head turn; None for all."""
    share = rope.positive("partial_rotary_factor", float, raw.positive("partial_rotary_factor", float, 1.0))
    if share == 1:
        return None
    if not partial:
        raise UserError(f"{raw.path}: partial_rotary_factor {share!r} is not supported; expected 1.0")
    return int(head_dim * share)


def _scaling(raw: Fields, rope: Fields, turned: int, longest: int) -> tuple[RopeScaling | None, int]:
    """The scaling, and the length of the longest text."""
    kind = _kind(rope)
    if kind not in KINDS:
        raise UserError(f"{raw.path}: rope_scaling type {kind!r} is not supported; expected one of {', '.join(KINDS)}")
    if kind in ("default", "dynamic"):  # a dynamic one changes nothing up to that length, and all keys beyond it
        return None, longest
    if kind == "linear":
        return RopeScaling(kind, rope.positive("factor", float)), longest
    if kind == "longrope":
        return _longrope(raw, rope, turned, longest)
    original = rope.positive("original_max_position_embeddings", default=longest if kind == "yarn" else None)
    if kind == "yarn":
        return _yarn(rope, original, longest)
    numbers = {name: rope.positive(name, float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return RopeScaling(kind, **numbers, original_max_position_embeddings=original), longest


def _yarn(rope: Fields, original: int, longest: int) -> tuple[RopeScaling, int]:
    factor = rope.positive("factor", float, longest / original)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    one, other = rope.get("mscale"), rope.get("mscale_all_dim")
    both = magnitude(rope.positive("mscale", float)) / magnitude(rope.positive("mscale_all_dim", float)) \
        if one and other else magnitude(1.0)  # fmt: skip
    scaling = RopeScaling(
        "yarn", factor,
        original_max_position_embeddings=original,
        beta_fast=rope.positive("beta_fast", float, 32.0),
        beta_slow=rope.positive("beta_slow", float, 1.0),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=rope.positive("attention_factor", float, both),
    )  # fmt: skip
    # Ministral 3 scales queries from that length on, which a cache of fixed rotations could take, and no kernel does.
    return scaling, original if rope.get("llama_4_scaling_beta") else max(longest, int(factor * original))


def _longrope(raw: Fields, rope: Fields, turned: int, longest: int) -> tuple[RopeScaling, int]:
    """With the factors of short texts: those of long ones would turn all cached keys anew, once a text has grown."""
    original = raw.positive(
        "original_max_position_embeddings", default=rope.get("original_max_position_embeddings", longest)
    )
    factor = rope.positive("factor", float, longest / original)
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention = rope.positive("attention_factor", float, attention)
    factors = tuple(map(float, rope.numbers("short_factor", turned // 2)))
    return RopeScaling("longrope", attention_factor=attention, factors=factors), min(original, longest)
