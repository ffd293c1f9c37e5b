"""Architectures of well-known models, for measuring speed with random weights and no download."""

import torch

from checkpoint import empty_model
from errors import UserError
from model import ModelConfig, RopeScaling, Transformer

LLAMA31_ROPE = RopeScaling("llama3", factor=8.0)

# Columns: vocabulary, hidden, intermediate, layers, heads, kv heads, head dim, context.
PRESETS = {
    "Llama-2-7B": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "Llama-2-13B": ModelConfig(32000, 5120, 13824, 40, 40, 40, 128, 4096),
    "Llama-2-70B": ModelConfig(32000, 8192, 28672, 80, 64, 8, 128, 4096),
    "Llama-3-8B": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=500000.0),
    "Llama-3.1-8B": ModelConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 131072, rope_theta=500000.0, rope_scaling=LLAMA31_ROPE
    ),
    "Llama-3-70B": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, 8192, rope_theta=500000.0),
    "Mistral-7B": ModelConfig(32000, 4096, 14336, 32, 32, 8, 128, 32768, sliding_windows=(4096,) * 32),
    "Qwen2.5-7B": ModelConfig(152064, 3584, 18944, 28, 28, 4, 128, 32768, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True),
    "Qwen3-8B": ModelConfig(151936, 4096, 12288, 36, 32, 8, 128, 40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True),
    "SmolLM2-135M": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=100000.0, tie_embeddings=True),
}

INIT_STD = 0.02  # as the families initialise; speed does not depend on it, finite logits do


def find_preset(name: str, option: str) -> ModelConfig:
    """The architecture of this name, whatever its case; option is the one that named it. Raises UserError."""
    by_lower = {known.lower(): config for known, config in PRESETS.items()}
    if name.lower() not in by_lower:
        raise UserError(f"{option} {name}: unknown; expected one of {', '.join(PRESETS)}")
    return by_lower[name.lower()]


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The named architecture with seeded normal weights, made on the device. Raises UserError for an unknown name."""
    model = empty_model(find_preset(name, "--random-weights"), device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=INIT_STD, generator=generator)
    return model
