"""GGUF files of every architecture, against the Hugging Face model they were written from; their tokenizers."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from teal.checkpoint.gguf import convert_gguf
from teal.checkpoint.gguf_families import FAMILIES
from teal.checkpoint.gguf_tokenizer import SCHEMES
from teal.checkpoint.source import resolve_checkpoint
from teal.checkpoint.tokenizer import load_tokenizer
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from tests.conftest import TEXT, assert_near, save_tiny_model, tiny_config
from tests.gguf_files import CPU, SIZES, byte_level_vocabulary, write_and_close, write_gguf

# Sizes beside SIZES, such that every number of the family's own computation counts.
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 40},
    "gemma2": {"head_dim": 40, "query_pre_attn_scalar": 40, "sliding_window": 7, "attn_logit_softcapping": 5.0,
               "final_logit_softcapping": 3.0},
    "gemma3": {"head_dim": 40, "query_pre_attn_scalar": 40, "sliding_window": 7},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                "logits_scaling": 4.0},
    "phi3": {"sliding_window": 7, "pad_token_id": 0},
    "glm4": {"head_dim": 40, "attention_bias": True, "pad_token_id": 0},
}  # fmt: skip


def own_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """What llama.cpp's converter writes for some families only, where config has it."""
    rope = config.rope_parameters
    adders = {
        "sliding_window": writer.add_sliding_window,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for name, add in adders.items():
        if (value := getattr(config, name, None)) is not None:
            add(value)
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        writer.add_rope_dimension_count(int(share * config.head_dim))


def convert(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [Type.F32, Type.Q5_0, Type.Q8_0], ids=lambda kind: kind.name)
def test_the_model_is_that_of_the_folder(
    family: str, kind: Type, tied: bool, tmp_path: Path, byte_level_tokenizer_json: str
) -> None:
    sizes = SIZES | OVERRIDES.get(family, {})
    config = tiny_config(FAMILIES[family].model_type, vocab_size=300, tie_word_embeddings=tied, **sizes)
    hf_model: Any = save_tiny_model(config, tmp_path / "hf")
    for name, parameter in hf_model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)

    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        own_metadata(writer, config)

    expected = write_gguf(tmp_path / "m.gguf", hf_model, kind, write)
    ours = load_model(convert(tmp_path / "m.gguf", tmp_path / "out"), CPU, torch.float32, keep_integers=True)
    hf_model.load_state_dict(expected)
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = ours(tokens, torch.arange(40)[None], ours.new_cache(1, 40))
        assert_near("logits", logits, hf_model(tokens).logits, 1e-5)


SHORT = [1.0 + i / 7 for i in range(16)]
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "linear": ("qwen3", {"rope_type": "linear", "factor": 8.0}),
    "longrope": ("phi3", {"rope_type": "longrope", "short_factor": SHORT, "long_factor": [9.0] * 16}),
}


def rope_metadata(writer: gguf.GGUFWriter, rope: dict[str, Any], original: int) -> None:
    """As llama.cpp's converter writes a scaling."""
    if rope["rope_type"] == "longrope":
        for name in ("short", "long"):
            factors = torch.tensor(rope[f"{name}_factor"]).numpy()
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    else:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(original)


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotations_are_those_of_the_folder(name: str, tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    family, scaling = ROPES[name]
    rope, original = {**scaling, "rope_theta": 1e4}, 64
    sizes: dict[str, Any] = SIZES | {"max_position_embeddings": 128, "pad_token_id": 0, "head_dim": 32}
    if name == "longrope":
        sizes["original_max_position_embeddings"] = original
    config = tiny_config(family, vocab_size=300, rope_parameters=rope, **sizes)
    hf_model: Any = save_tiny_model(config, tmp_path / "hf")

    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        rope_metadata(writer, rope, scaling.get("original_max_position_embeddings", original))

    write_gguf(tmp_path / "m.gguf", hf_model, Type.F32, write)
    ours = load_model(convert(tmp_path / "m.gguf", tmp_path / "out"), CPU, torch.float32)
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = ours(tokens, torch.arange(40)[None], ours.new_cache(1, 40))
        assert_near("logits", logits, hf_model(tokens).logits, 1e-5)
    assert ours.config.rope_scaling is not None and ours.config.rope_scaling.kind == name


def test_a_tensor_of_another_architecture_is_refused(tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    model = save_tiny_model(tiny_config("qwen2", vocab_size=300, **SIZES), tmp_path / "hf")

    def write(writer: gguf.GGUFWriter) -> None:
        byte_level_vocabulary(byte_level_tokenizer_json)(writer)
        writer.add_tensor("blk.0.ffn_gate_inp.weight", torch.zeros(4, 4).numpy())

    write_gguf(tmp_path / "m.gguf", model, Type.F32, write)
    with pytest.raises(UserError, match=r"m\.gguf: GGUF tensor blk\.0\.ffn_gate_inp\.weight has no place in a qwen2"):
        convert(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(("architecture", "nearest"), [("qwen2moe", "qwen2"), ("qwen35", "qwen3"), ("llama4", "llama")])
def test_an_unknown_architecture_is_refused_with_the_nearest(architecture: str, nearest: str, tmp_path: Path) -> None:
    write_and_close(gguf.GGUFWriter(tmp_path / "m.gguf", architecture))
    with pytest.raises(UserError, match=f"'{architecture}' is not supported.*nearest by name is {nearest}"):
        resolve_checkpoint(str(tmp_path / "m.gguf"))


# Text that tells schemes apart: digits, contractions of either case, capitals within words. Also marks beside a line's
# end or a slash, and an accent of its own.
HARD = (
    "It's IT'S 12345 and 3.14, getHTTPResponse foo/bar//\n\n  x\t\ty ...\n $% Größe e\u0301t\u00e9 зима 東京 don't\r\n"
)


def pieces(pattern: str) -> list[str]:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return [text for text, _ in split.pre_tokenize_str(HARD)]


def test_schemes_split_as_their_families_do() -> None:
    """By what distinguishes them: digits, case, and where a line's end belongs."""

    def split(name: str) -> list[str]:
        pattern = SCHEMES[name].pattern
        assert pattern is not None
        found = pieces(pattern)
        assert "".join(found) == HARD
        return found

    assert " 12345" not in split("llama-bpe") and {"123", "45"} <= set(split("llama-bpe"))
    assert {"1", "2", "3", "4", "5"} <= set(split("qwen2")) and "123" not in split("qwen2")
    assert {" getHTTPResponse", "'S", "/bar"} <= set(split("llama-bpe"))
    assert {" get", "HTTPResponse"} <= set(split("tekken")) and "//\n\n" in split("tekken")
    assert {"It's", "IT'S", "123"} <= {piece.strip() for piece in split("gpt-4o")}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_makes_a_tokenizer(scheme: str, tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        vocabulary(writer)
        writer.kv_data[0]["tokenizer.ggml.pre"] = gguf.gguf_writer.GGUFValue(scheme, gguf.GGUFValueType.STRING)

    vocabulary = byte_level_vocabulary(byte_level_tokenizer_json)
    model = save_tiny_model(tiny_config("qwen2", vocab_size=300, **SIZES), tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", model, Type.F16, write)
    folder = convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(folder)
    for text in (TEXT, HARD):
        ids = tokenizer.encode(text)
        normalizer = SCHEMES[scheme].normalizer
        expected = text if normalizer is None else normalizer.normalize_str(text)
        assert tokenizer.decode(ids) == expected
    assert transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).encode(TEXT)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
