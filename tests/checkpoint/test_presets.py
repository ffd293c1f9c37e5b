"""Architectures for --random-weights have the published numbers of parameters, the vision parts left out."""

import pytest
import torch

from teal.architectures import ARCHITECTURES
from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.presets import INIT_STD, PRESETS
from teal.layers.quantized_linear import QuantizedLinear
from teal.model import Transformer
from teal.options import ModelOptions

BILLIONS = {
    "Gemma-2-2B": 2.614, "Gemma-2-9B": 9.242, "Gemma-3-1B": 1.000, "Gemma-3-4B": 3.880, "Gemma-3-12B": 11.766,
    "GLM-4-9B": 9.400, "Granite-3.3-2B": 2.534, "Granite-3.3-8B": 8.171, "Llama-2-7B": 6.738, "Llama-2-13B": 13.016,
    "Llama-2-70B": 68.977, "Llama-3-8B": 8.030, "Llama-3.1-8B": 8.030, "Llama-3.2-1B": 1.236, "Llama-3.2-3B": 3.213,
    "Llama-3-70B": 70.554, "Ministral-8B": 8.020, "Mistral-7B": 7.242, "Mistral-Nemo-12B": 12.248,
    "Mistral-Small-24B": 23.572, "OLMo-2-1B": 1.485, "OLMo-2-7B": 7.299, "Phi-3.5-mini": 3.821, "Phi-4-mini": 3.836,
    "Phi-4": 14.660, "Qwen2.5-0.5B": 0.494, "Qwen2.5-1.5B": 1.544, "Qwen2.5-7B": 7.616, "Qwen2.5-14B": 14.770,
    "Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.721, "Qwen3-4B": 4.022, "Qwen3-8B": 8.191, "Qwen3-14B": 14.768,
    "SmolLM2-135M": 0.1345, "SmolLM3-3B": 3.075, "StableLM-3B": 2.795, "StableLM-2-1.6B": 1.645,
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sizes_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.0006)


@pytest.mark.parametrize("quant,bits", [("int8", torch.int8), ("int4", torch.int32)])
def test_rounded_weights_are_made_rounded(quant: str, bits: torch.dtype) -> None:
    """With the spread of the floats, which are never all there."""
    loaded = load_for_decoding(ModelOptions(random_weights="SmolLM2-135M", quant=quant, quant_lm_head="int8"))
    model = loaded.model
    assert loaded.identity == f"random-smollm2-135m-{quant}-head8"
    for module in (model.blocks[3].feed_forward.down, model.blocks[0].attention.wqkv, model.lm_head):
        assert isinstance(module, QuantizedLinear)
        assert abs(float(module.dequantized().float().std()) / INIT_STD - 1) < 0.05
    assert model.blocks[3].feed_forward.down.weight.dtype == bits
    assert abs(float(model.embedding.weight.float().std()) / INIT_STD - 1) < 0.05
