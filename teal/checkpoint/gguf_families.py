"""How llama.cpp's converter stores the models of each architecture: a table, which needs neither torch nor gguf."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# GGUF's names of projections, by ours.
PROJECTION_NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True)
class GGUFFamily:
    """One architecture: the model_type that config.json calls it by, and what differs from the others.

    names: of a layer's tensors beside the projections, in a Hugging Face layer by the one in a GGUF layer.
    pairs_rows: channels of q and k that rotate together are neighbours. constants: fields of config.json in all models.
    """

    model_type: str
    transformers_class: str
    names: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    pairs_rows: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily(
        "llama", "LlamaForCausalLM", pairs_rows=True, constants={"attention_bias": False, "mlp_bias": False}
    ),
    "qwen2": GGUFFamily("qwen2", "Qwen2ForCausalLM", constants={"use_sliding_window": False}),
    "qwen3": GGUFFamily(
        "qwen3", "Qwen3ForCausalLM", PRE_NORMS | HEAD_NORMS,
        constants={"use_sliding_window": False, "attention_bias": False},
    ),
}  # fmt: skip
