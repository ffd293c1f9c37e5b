"""Every model family against transformers on the same random weights: logits, cached decoding, greedy text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from teal.checkpoint.weights import load_model
from teal.model import KVCache, Transformer
from tests.conftest import assert_near, save_tiny_model, tiny_config

CPU = torch.device("cpu")
PROMPT, STEPS = 20, 32
TOLERANCE = 1e-5
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.25, 2.0],
    "long_factor": [4.0, 5.0, 6.0],
}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "layer_types": LAYER_TYPES,
    "tie_word_embeddings": True,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
GLM = {"head_dim": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 6}),
    "llama3-rope-scaling": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "smollm2": (
        "llama",
        {"tie_word_embeddings": True, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54},
    ),
    "mistral-sliding": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3-sliding": (
        "qwen3",
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "gemma": ("gemma", {"head_dim": 12, "hidden_act": "gelu", "tie_word_embeddings": True}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3-linear-rope": ("gemma3_text", GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "granite": ("granite", GRANITE),
    "granite-tied": ("granite", GRANITE | {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "smollm3-sliding": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 9, "no_rope_layers": [1, 0, 1]},
    ),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", {"sliding_window": 9}),
    "phi4-mini": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "glm": ("glm", GLM),
    "glm4": ("glm4", GLM),
    "ministral": (
        "ministral",
        {"head_dim": 8, "sliding_window": 9, "layer_types": ["sliding_attention", *2 * ["full_attention"]]},
    ),
    "ministral3": ("ministral3", {"head_dim": 12, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.2, "truncate": False}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
}


@torch.inference_mode()
def decode_with_cache(model: Transformer, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits [T, V] of tokens [1, T]: the first prompt of them in one call, the others one by one."""
    cache = KVCache(model.config, 1, 64, CPU, torch.float32)
    positions = torch.arange(tokens.shape[1])[None]
    logits = [model(tokens[:, :prompt], positions[:, :prompt], cache)]
    logits += [model(tokens[:, i : i + 1], positions[:, i : i + 1], cache) for i in range(prompt, tokens.shape[1])]
    return torch.cat(logits, dim=1)[0]


@torch.inference_mode()
def greedy(model: Transformer, prompt: torch.Tensor, count: int) -> list[int]:
    cache = KVCache(model.config, 1, 64, CPU, torch.float32)
    tokens, positions = prompt, torch.arange(prompt.shape[1])[None]
    result: list[int] = []
    for _ in range(count):
        tokens = model(tokens, positions, cache)[:, -1:].argmax(-1)
        positions = positions[:, -1:] + 1
        result.append(int(tokens))
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_matches_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    expected_model: Any = save_tiny_model(tiny_config(family, **overrides), tmp_path)
    model = load_model(tmp_path, CPU, torch.float32)
    tokens = torch.randint(0, 199, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = expected_model(tokens).logits[0]
    actual = decode_with_cache(model, tokens, PROMPT)
    assert_near(f"{name}: prefill logits", actual[:PROMPT], expected[:PROMPT], TOLERANCE)
    for step in range(PROMPT, PROMPT + STEPS):
        assert_near(f"{name}: logits of decode step {step - PROMPT}", actual[step], expected[step], TOLERANCE)
    text = expected_model.generate(tokens[:, :PROMPT], do_sample=False, max_new_tokens=STEPS, pad_token_id=0)
    assert greedy(model, tokens[:, :PROMPT], STEPS) == text[0, PROMPT:].tolist(), f"{name}: greedy text"


def test_older_config_fields(tmp_path: Path) -> None:
    """Folders written by transformers 4 keep rope_theta and rope_scaling at the top level."""
    expected_model: Any = save_tiny_model(tiny_config("llama", rope_parameters=LLAMA3_ROPE), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    path.write_text(json.dumps(config))
    tokens = torch.arange(40)[None]
    with torch.inference_mode():
        expected = expected_model(tokens).logits[0]
    actual = decode_with_cache(load_model(tmp_path, CPU, torch.float32), tokens, 8)
    assert_near("logits", actual, expected, TOLERANCE)


def test_batch_rows_with_their_own_positions(tmp_path: Path) -> None:
    """Two prompts of different length in one batch get the logits each gets alone."""
    save_tiny_model(tiny_config("mistral", sliding_window=5), tmp_path)
    model = load_model(tmp_path, CPU, torch.float32)
    tokens = torch.arange(24).view(2, 12)
    offsets = torch.tensor([[0], [6]])
    cache = KVCache(model.config, 2, 64, CPU, torch.float32)
    history = torch.arange(50, 56)[None]
    alone = KVCache(model.config, 1, 64, CPU, torch.float32)
    with torch.inference_mode():
        model(history, torch.arange(6)[None], alone)
        cache.k[:, 1], cache.v[:, 1] = alone.k[:, 0], alone.v[:, 0]
        together = model(tokens, torch.arange(12)[None] + offsets, cache)
        second = model(tokens[1:], torch.arange(6, 18)[None], alone)
        first = model(tokens[:1], torch.arange(12)[None], KVCache(model.config, 1, 64, CPU, torch.float32))
    assert_near("logits of row 0", together[0], first[0], TOLERANCE)
    assert_near("logits of row 1", together[1], second[0], TOLERANCE)


def test_default_model_matches_transformers(default_folder: Path, default_floats: Path) -> None:
    """The converted GGUF (permuted q and k, dequantized weights) is the model transformers reads from its floats."""
    expected_model = transformers.AutoModelForCausalLM.from_pretrained(default_floats, dtype=torch.float32)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(default_folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]])
    model = load_model(default_folder, CPU, torch.float32)
    with torch.inference_mode():
        expected = expected_model(prompt).logits[0]
    assert_near("logits", decode_with_cache(model, prompt, prompt.shape[1] - 3), expected, TOLERANCE)
    text = expected_model.generate(prompt, do_sample=False, max_new_tokens=12)[0, prompt.shape[1] :].tolist()
    ours = greedy(model, prompt, len(text))
    assert ours == text
    assert "Paris" in tokenizer.decode(ours)
