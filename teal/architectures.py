"""Architectures of well-known models, by name. Numbers alone: --help lists the names without importing torch."""

from typing import Any


def _llama(*sizes: int, **more: Any) -> dict[str, Any]:
    """Fields of model.ModelConfig, the sizes in the order of names."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "max_seq_len",
    )
    return dict(zip(names, sizes, strict=True)) | more


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _llama(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "Llama-2-13B": _llama(32000, 5120, 13824, 40, 40, 40, 128, 4096),
    "Llama-2-70B": _llama(32000, 8192, 28672, 80, 64, 8, 128, 4096),
    "Llama-3-8B": _llama(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=500000.0),
    "Llama-3.1-8B": _llama(
        128256, 4096, 14336, 32, 32, 8, 128, 131072, rope_theta=500000.0,
        rope_scaling={"kind": "llama3", "factor": 8.0},
    ),
    "Llama-3-70B": _llama(128256, 8192, 28672, 80, 64, 8, 128, 8192, rope_theta=500000.0),
    "Mistral-7B": _llama(32000, 4096, 14336, 32, 32, 8, 128, 32768, sliding_windows=(4096,) * 32),
    "Qwen2.5-7B": _llama(152064, 3584, 18944, 28, 28, 4, 128, 32768, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True),
    "Qwen3-8B": _llama(151936, 4096, 12288, 36, 32, 8, 128, 40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True),
    "SmolLM2-135M": _llama(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=100000.0, tie_embeddings=True),
}  # fmt: skip
