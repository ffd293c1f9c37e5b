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
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
GEMMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **POST_NORMS}
GATE_UP = {"ffn_up": "mlp.gate_up_proj"}  # both in one tensor
# Fields of config.json, by the metadata after the architecture's name.
WINDOW = {"sliding_window": "attention.sliding_window"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
GRANITE = {
    "attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale",
}  # fmt: skip
GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
NO_WINDOW, NO_BIAS = {"use_sliding_window": False}, {"attention_bias": False}


@dataclass(frozen=True, slots=True)
class GGUFFamily:
    """One architecture: the model_type that config.json calls it by, and what differs from the others.

    names: of a layer's tensors beside the projections, in a Hugging Face layer by the one in a GGUF layer.
    pairs_rows: channels of q and k that rotate together are neighbours. norm_offset: what the converter added to norms.
    constants: fields of config.json in all models. fields: those that the metadata hold, by their names there.
    wide_layers: so many layers has the one model whose scores are divided by the root of hidden size over heads.
    """

    model_type: str
    transformers_class: str
    names: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    pairs_rows: bool = False
    norm_offset: float = 0.0
    constants: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    wide_layers: int | None = None


FAMILIES: dict[str, GGUFFamily] = {
    "llama": GGUFFamily("llama", "LlamaForCausalLM", pairs_rows=True, constants=NO_BIAS | {"mlp_bias": False}),
    "qwen2": GGUFFamily("qwen2", "Qwen2ForCausalLM", constants=NO_WINDOW),
    "qwen3": GGUFFamily("qwen3", "Qwen3ForCausalLM", PRE_NORMS | HEAD_NORMS, constants=NO_WINDOW | NO_BIAS),
    "gemma": GGUFFamily("gemma", "GemmaForCausalLM", norm_offset=1.0, constants=GELU),
    "gemma2": GGUFFamily(
        "gemma2", "Gemma2ForCausalLM", GEMMA_NORMS, norm_offset=1.0, constants=GELU, fields=WINDOW | CAPS,
        wide_layers=46,
    ),
    "gemma3": GGUFFamily(
        "gemma3_text", "Gemma3ForCausalLM", GEMMA_NORMS | HEAD_NORMS, norm_offset=1.0,
        constants=GELU | {"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        fields=WINDOW | CAPS | {
            "rope_local_base_freq": "rope.freq_base_swa", "sliding_window_pattern": "attention.sliding_window_pattern",
        },
        wide_layers=62,
    ),
    "granite": GGUFFamily("granite", "GraniteForCausalLM", pairs_rows=True, constants=NO_BIAS, fields=GRANITE),
    "olmo2": GGUFFamily("olmo2", "Olmo2ForCausalLM", POST_NORMS | HEAD_NORMS, constants=NO_BIAS),
    "smollm3": GGUFFamily(
        "smollm3", "SmolLM3ForCausalLM", pairs_rows=True,
        constants=NO_WINDOW | NO_BIAS | {"no_rope_layer_interval": 4},
    ),
    "phi3": GGUFFamily(
        "phi3", "Phi3ForCausalLM", PRE_NORMS | GATE_UP | {"attn_qkv": "self_attn.qkv_proj"}, fields=WINDOW
    ),
    "glm4": GGUFFamily(
        "glm4", "Glm4ForCausalLM",
        PRE_NORMS | GATE_UP | {
            "post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm",
        },
    ),
}  # fmt: skip
