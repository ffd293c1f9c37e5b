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


def _qwen2(*sizes: int, **more: Any) -> dict[str, Any]:
    return _llama(*sizes, norm_eps=1e-6, rope_theta=1e6, qkv_bias=True, **more)


def _qwen3(*sizes: int, **more: Any) -> dict[str, Any]:
    return _llama(*sizes, norm_eps=1e-6, rope_theta=1e6, qk_norm=True, **more)


def _gemma(*sizes: int, windows: tuple[int | None, ...], **more: Any) -> dict[str, Any]:
    """windows repeat over the layers."""
    names = _llama(*sizes)
    layers = names["num_layers"]
    fields = {"norm_eps": 1e-6, "tie_embeddings": True, "activation": "gelu_tanh", "post_norm": True}
    own = {"embedding_scale": names["hidden_size"] ** 0.5, "sliding_windows": (windows * layers)[:layers]}
    return names | fields | own | more


def _gemma2(*sizes: int) -> dict[str, Any]:
    return _gemma(*sizes, windows=(4096, None), attention_softcap=50.0, logit_softcap=30.0)


def _gemma3(*sizes: int, window: int = 1024, factor: float | None = 8.0) -> dict[str, Any]:
    scaling = None if factor is None else {"kind": "linear", "factor": factor}
    windows = (window,) * 5 + (None,)
    return _gemma(
        *sizes, windows=windows, qk_norm=True, rope_theta=1e6, local_rope_theta=1e4, rope_scaling=scaling
    )  # fmt: skip


def _llama3(*sizes: int, factor: float, **more: Any) -> dict[str, Any]:
    return _llama(*sizes, rope_theta=500000.0, rope_scaling={"kind": "llama3", "factor": factor}, **more)


def _olmo2(*sizes: int) -> dict[str, Any]:
    norms = {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_full": True}
    return _llama(*sizes, norm_eps=1e-6, rope_theta=500000.0, **norms)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Gemma-2-2B": _gemma2(256000, 2304, 9216, 26, 8, 4, 256, 8192),
    "Gemma-2-9B": _gemma2(256000, 3584, 14336, 42, 16, 8, 256, 8192),
    "Gemma-3-1B": _gemma3(262144, 1152, 6912, 26, 4, 1, 256, 32768, window=512, factor=None),
    "Gemma-3-4B": _gemma3(262208, 2560, 10240, 34, 8, 4, 256, 131072),
    "Gemma-3-12B": _gemma3(262208, 3840, 15360, 48, 16, 8, 256, 131072),
    "GLM-4-9B": _llama(
        151552, 4096, 13696, 40, 32, 2, 128, 32768, qkv_bias=True, post_norm=True, rotary_dim=64,
    ),
    "Granite-3.3-2B": _llama(
        49159, 2048, 8192, 40, 32, 8, 64, 131072, rope_theta=1e7, embedding_scale=12.0, tie_embeddings=True,
    ),
    "Granite-3.3-8B": _llama(49159, 4096, 12800, 40, 32, 8, 128, 131072, rope_theta=1e7, embedding_scale=12.0,
                             tie_embeddings=True),
    "Llama-2-7B": _llama(32000, 4096, 11008, 32, 32, 32, 128, 4096),
    "Llama-2-13B": _llama(32000, 5120, 13824, 40, 40, 40, 128, 4096),
    "Llama-2-70B": _llama(32000, 8192, 28672, 80, 64, 8, 128, 4096),
    "Llama-3-8B": _llama(128256, 4096, 14336, 32, 32, 8, 128, 8192, rope_theta=500000.0),
    "Llama-3.1-8B": _llama3(128256, 4096, 14336, 32, 32, 8, 128, 131072, factor=8.0),
    "Llama-3.2-1B": _llama3(128256, 2048, 8192, 16, 32, 8, 64, 131072, factor=32.0, tie_embeddings=True),
    "Llama-3.2-3B": _llama3(128256, 3072, 8192, 28, 24, 8, 128, 131072, factor=32.0, tie_embeddings=True),
    "Llama-3-70B": _llama(128256, 8192, 28672, 80, 64, 8, 128, 8192, rope_theta=500000.0),
    "Ministral-8B": _llama(131072, 4096, 12288, 36, 32, 8, 128, 32768, rope_theta=1e8),
    "Mistral-7B": _llama(32000, 4096, 14336, 32, 32, 8, 128, 32768, sliding_windows=(4096,) * 32),
    "Mistral-Nemo-12B": _llama(131072, 5120, 14336, 40, 32, 8, 128, 131072, rope_theta=1e6),
    "Mistral-Small-24B": _llama(131072, 5120, 32768, 40, 32, 8, 128, 32768, rope_theta=1e8),
    "OLMo-2-1B": _olmo2(100352, 2048, 8192, 16, 16, 16, 128, 4096),
    "OLMo-2-7B": _olmo2(100352, 4096, 11008, 32, 32, 32, 128, 4096),
    "Phi-3.5-mini": _llama(32064, 3072, 8192, 32, 32, 32, 96, 4096),
    "Phi-4-mini": _llama(200064, 3072, 8192, 32, 24, 8, 128, 4096, rotary_dim=96, tie_embeddings=True),
    "Phi-4": _llama(100352, 5120, 17920, 40, 40, 10, 128, 16384, rope_theta=250000.0),
    "Qwen2.5-0.5B": _qwen2(151936, 896, 4864, 24, 14, 2, 64, 32768, tie_embeddings=True),
    "Qwen2.5-1.5B": _qwen2(151936, 1536, 8960, 28, 12, 2, 128, 32768, tie_embeddings=True),
    "Qwen2.5-7B": _qwen2(152064, 3584, 18944, 28, 28, 4, 128, 32768),
    "Qwen2.5-14B": _qwen2(152064, 5120, 13824, 48, 40, 8, 128, 32768),
    "Qwen3-0.6B": _qwen3(151936, 1024, 3072, 28, 16, 8, 128, 40960, tie_embeddings=True),
    "Qwen3-1.7B": _qwen3(151936, 2048, 6144, 28, 16, 8, 128, 40960, tie_embeddings=True),
    "Qwen3-4B": _qwen3(151936, 2560, 9728, 36, 32, 8, 128, 40960, tie_embeddings=True),
    "Qwen3-8B": _qwen3(151936, 4096, 12288, 36, 32, 8, 128, 40960),
    "Qwen3-14B": _qwen3(151936, 5120, 17408, 40, 40, 8, 128, 40960),
    "SmolLM2-135M": _llama(49152, 576, 1536, 30, 9, 3, 64, 8192, rope_theta=100000.0, tie_embeddings=True),
    "SmolLM3-3B": _llama(
        128256, 2048, 11008, 36, 16, 4, 128, 65536, norm_eps=1e-6, rope_theta=5e6, tie_embeddings=True,
        unrotated_layers=tuple(range(3, 36, 4)),
    ),
}  # fmt: skip
