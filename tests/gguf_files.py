"""GGUF files of random models, written by llama.cpp's own package."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from teal.checkpoint.gguf_config import tensor_names
from teal.checkpoint.gguf_families import FAMILIES

CPU = torch.device("cpu")


# K-quants come in blocks of 256 weights, so every row is a multiple of that.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


# Step of the coarsest value a type can hold, over the largest weight of its block.
ROUNDING = {Type.F32: 0.0, Type.F16: 1e-3, Type.BF16: 4e-3, Type.Q8_0: 8e-3, Type.Q5_0: 0.07, Type.Q5_1: 0.07}
ROUNDING |= {Type.Q4_0: 0.14, Type.Q4_1: 0.14}


# Projections that are floats of 16 bits, by architecture. They are scaled, cut or turned as they are loaded, or stand
# in one weight with such.
FLOATS = {
    "granite": ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
    "phi3": ("qkv_proj", "gate_up_proj"),
    "glm4": ("q_proj", "k_proj", "v_proj", "gate_up_proj"),
}
K_QUANTS = (Type.Q4_K, Type.Q5_K, Type.Q6_K)  # the gguf package reads these but does not write them


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k weight as llama.cpp orders them: channel i of a head next to channel i + D/2."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(weight.shape)


def random_k_quant(rng: np.random.Generator, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Valid blocks of a K-quant with random content: bytes at random, fp16 scales small."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (int(np.prod(shape)) // block, size), dtype=np.uint8)
    scales = rng.uniform(1e-5, 1e-4, (raw.shape[0], 2)).astype(np.float16).view(np.uint8)
    if kind == Type.Q6_K:
        raw[:, -2:] = scales[:, :2]
    else:
        raw[:, :4] = scales
    return raw.reshape(*shape[:-1], -1)


def _write_sizes(writer: gguf.GGUFWriter, c: Any) -> None:
    """Of a transformers config c."""
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    rope = c.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if (head_dim := getattr(c, "head_dim", None)) is not None:
        writer.add_key_length(head_dim)


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    kind: Type,
    tokenizer: Callable[[gguf.GGUFWriter], None],
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Write model's weights in a GGUF file as kind; returns the floats that they stand for, in HF layout.

    The architecture is called as the model's family. options: of gguf.GGUFWriter.
    """
    c = model.config
    architecture, family = next((name, f) for name, f in FAMILIES.items() if f.model_type == c.model_type)
    writer = gguf.GGUFWriter(path, architecture, **options)
    _write_sizes(writer, c)
    tokenizer(writer)
    back = {hf.split(".")[-1]: name for name, hf in tensor_names(architecture).items()}
    rng = np.random.default_rng(0)
    expected = {}
    for name, weight in model.state_dict().items():
        *prefix, stem, suffix = name.split(".")
        block = f"blk.{name.split('.')[2]}." if "layers" in prefix else ""
        values = weight.numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(stem)
        heads = heads if family.pairs_rows else None
        if values.ndim == 1:
            offset = family.norm_offset if suffix == "weight" else 0.0
            writer.add_tensor(f"{block}{back[stem]}.{suffix}", values + np.float32(offset))
            expected[name] = weight
            continue
        if kind in K_QUANTS:
            stored = random_k_quant(rng, values.shape, kind)
        else:
            stored = gguf.quantize(interleave(values, heads) if heads else values, kind)
        writer.add_tensor(f"{block}{back[stem]}.{suffix}", stored, raw_dtype=kind)
        read = torch.from_numpy(np.array(gguf.dequantize(stored, kind)))
        if heads:
            read = read.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        is_rounded = kind not in (Type.F32, Type.BF16) and stem in FLOATS.get(architecture, ())
        expected[name] = read.half().float() if is_rounded else read
    write_and_close(writer)
    return expected


def write_and_close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level_vocabulary(path_json: str) -> Callable[[gguf.GGUFWriter], None]:
    """Writes a tokenizer.json's byte-level BPE as GGUF metadata."""
    inner = tokenizers.Tokenizer.from_str(path_json)
    tokens = [str(inner.id_to_token(i)) for i in range(inner.get_vocab_size())]
    special = {t.content for t in inner.get_added_tokens_decoder().values()}
    merges = json.loads(path_json)["model"]["merges"]

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in special else 1 for t in tokens])
        writer.add_token_merges([" ".join(m) for m in merges])
        writer.add_eos_token_id(tokens.index("</s>"))
        writer.add_chat_template("{{ messages[0]['content'] }}")

    return write


def sentencepiece_vocabulary(content: bytes) -> Callable[[gguf.GGUFWriter], None]:
    sp = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = range(sp.get_piece_size())

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([sp.id_to_piece(i) for i in ids])
        writer.add_token_scores([sp.get_score(i) for i in ids])
        kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1 for i in ids]
        writer.add_token_types(kinds)
        writer.add_bos_token_id(sp.bos_id())
        writer.add_eos_token_id(sp.eos_id())

    return write
