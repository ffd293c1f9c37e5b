"""What a GGUF file's metadata says of the model, as a Hugging Face config.json, and where its tensors belong there."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import ReaderTensor

from teal.checkpoint.config import SIZELESS
from teal.checkpoint.gguf_families import FAMILIES, OUTER_NAMES, PROJECTION_NAMES
from teal.errors import UserError
from teal.model import rope_frequencies
from teal.rope import RopeScaling

LLAMA3_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
# Ends of a turn, a message or a text, which llama.cpp knows by name, too: a file may declare one of several. Not </s>,
# which is plain text in some vocabularies.
END_TOKENS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>"),
        *("<|end_of_turn|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"),
    )
)


class Metadata:
    """The metadata of a file by key; those of its architecture by what follows the architecture's name.

    Raises UserError, naming the file, for a required key that is missing.
    """

    def __init__(self, path: Path, entries: dict[str, Any]) -> None:
        self.path, self.entries = path, entries
        self.architecture: str = entries["general.architecture"]
        self.family = FAMILIES[self.architecture]
        self.tokens: list[str] = self.required("tokenizer.ggml.tokens")

    def required(self, key: str) -> Any:
        if key not in self.entries:
            raise UserError(f"{self.path}: GGUF metadata lacks {key}; download the file again or convert it anew")
        return self.entries[key]

    def own(self, key: str, default: Any = None) -> Any:
        """An entry of the architecture, as attention.head_count; default if there is none."""
        return self.entries.get(f"{self.architecture}.{key}", default)

    def own_required(self, key: str) -> Any:
        return self.required(f"{self.architecture}.{key}")

    def token_id(self, role: str) -> int | None:
        """The id of bos, eos, eot (end of turn), eom (end of message) or unknown; None for one that is no token."""
        found = self.entries.get(f"tokenizer.ggml.{role}_token_id")
        return int(found) if found is not None and 0 <= found < len(self.tokens) else None

    def end_ids(self) -> list[int]:
        """Tokens that end a generation: those the metadata names, and those of a well-known name."""
        ids = {i for role in ("eos", "eot", "eom") if (i := self.token_id(role)) is not None}
        return sorted(ids | {i for i, token in enumerate(self.tokens) if token in END_TOKENS})


def hf_config(meta: Metadata, tensors: list[ReaderTensor]) -> dict[str, Any]:
    """The config.json of the model. Raises UserError for metadata that lack something or mean another computation."""
    family, required = meta.family, meta.own_required
    heads, hidden = required("attention.head_count"), required("embedding_length")
    config = {
        "architectures": [family.transformers_class],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length"),
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.own("attention.head_count_kv", heads),
        "head_dim": meta.own("attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "rms_norm_eps": round(required("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": meta.own("rope.freq_base", 10000.0),
        "max_position_embeddings": required("context_length"),
        "vocab_size": len(meta.tokens),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in tensors),
        "torch_dtype": "float16",
        "bos_token_id": meta.token_id("bos"),
        "eos_token_id": meta.token_id("eos"),
        **family.constants,
    }
    config |= {name: meta.own(key) for name, key in family.fields.items() if meta.own(key) is not None}
    if family.wide_layers is not None:
        wide = config["num_hidden_layers"] == family.wide_layers
        config["query_pre_attn_scalar"] = hidden // heads if wide else config["head_dim"]
    if "attention_bias" not in config:
        config["attention_bias"] = any(tensor.name == "blk.0.attn_q.bias" for tensor in tensors)
    turned = meta.own("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        config["partial_rotary_factor"] = turned / config["head_dim"]
    return config | _rope_scaling(meta, config, tensors)


def _rope_scaling(meta: Metadata, config: dict[str, Any], tensors: Iterable[ReaderTensor]) -> dict[str, Any]:
    """The fields of config.json that say how rotations are scaled."""
    held = {t.name: np.array(t.data) for t in tensors if t.name in (LLAMA3_FACTORS, *LONGROPE_FACTORS)}
    original = meta.own("rope.scaling.original_context_length", config["max_position_embeddings"])
    if len(held) == len(LONGROPE_FACTORS):
        short, long = ([float(v) for v in held[name]] for name in LONGROPE_FACTORS)
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        return {"rope_scaling": scaling, "original_max_position_embeddings": original}
    if LLAMA3_FACTORS in held:
        return {"rope_scaling": _llama3_scaling(meta.path, config, held[LLAMA3_FACTORS])}
    kind = meta.own("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_scaling": None}
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{meta.path}: {meta.architecture}.rope.scaling.type {kind!r} is not supported; "
            f"expected none, linear or yarn"
        )
    scaling = {"rope_type": kind, "factor": meta.own_required("rope.scaling.factor")}
    return {"rope_scaling": scaling | ({"original_max_position_embeddings": original} if kind == "yarn" else {})}


def _llama3_scaling(path: Path, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Llama 3.1+ files hold the divisor of each frequency instead of the four numbers it came from.

    The largest divisor is the scaling factor; the other three are the same in every published model.
    """
    scaling = RopeScaling("llama3", factor=float(factors.max()))
    plain_config = replace(SIZELESS, head_dim=config["head_dim"], rope_theta=config["rope_theta"])
    cpu = torch.device("cpu")
    plain = rope_frequencies(plain_config, cpu)
    scaled = rope_frequencies(replace(plain_config, rope_scaling=scaling), cpu)
    if factors.shape != tuple(plain.shape) or not np.allclose((plain / scaled).numpy(), factors, rtol=1e-3):
        raise UserError(f"{path}: {LLAMA3_FACTORS} is not Llama 3's frequency scaling, the only one supported")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def tensor_names(architecture: str) -> dict[str, str]:
    """Hugging Face's names of an architecture's tensors, less layer and suffix, by GGUF's."""
    projections = {
        PROJECTION_NAMES[name]: hf_name
        for p in SIZELESS.projections()
        for name, hf_name in zip(p.names, p.hf_names, strict=True)
    }
    return OUTER_NAMES | projections | dict(FAMILIES[architecture].names)


def hf_name(meta: Metadata, name: str) -> str | None:
    """The Hugging Face name of a tensor, as blk.0.attn_norm.weight; None for those the config covers already.

    Raises UserError for one that has no place in such a model.
    """
    if name in (LLAMA3_FACTORS, *LONGROPE_FACTORS):
        return None
    prefix, own = "", name
    if name.startswith("blk."):
        _, layer, own = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    stem, _, suffix = own.rpartition(".")
    names = tensor_names(meta.architecture)
    if stem not in names or suffix not in ("weight", "bias"):
        raise UserError(f"{meta.path}: GGUF tensor {name} has no place in a {meta.architecture} model of dense blocks")
    return f"{prefix}{names[stem]}.{suffix}"
