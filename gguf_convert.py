"""GGUF file (llama architecture) -> an ordinary Hugging Face folder: config, safetensors, tokenizer.

The `gguf` package reads and dequantizes the tensors; this module only renames them, undoes the
row permutation llama.cpp applies to q and k for its interleaved rotary embedding, and rebuilds
`tokenizer.json` from the vocabulary in the metadata. Values are stored as F16, the precision of
the scales in every quantized GGUF type, except where the source itself is BF16 or F32. If all projections
are Q4_0 or all are Q8_0, which is integers (less 8) with a scale for 32 input channels, they stay so: in the
layouts of AWQ and GPTQ.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from awq_gptq import as_awq, as_gptq
from errors import UserError
from gguf_header import check_architecture
from model import ModelConfig, RopeScaling, rope_frequencies
from progress import progress

READABLE_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
# Types whose integers stay, if all projections have one of them: the quantization_config of the layout they get.
KEPT: dict[GGMLQuantizationType, dict[str, Any]] = {
    GGMLQuantizationType.Q4_0: {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    GGMLQuantizationType.Q8_0: {
        "quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": True, "checkpoint_format": "gptq_v2",
    },
}  # fmt: skip
SHARD_BYTES = 2 << 30  # bounds host memory: one shard is held while it is written

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Regular expressions that split text before byte-level BPE, by the name GGUF gives the scheme.
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTROL_TOKEN, USER_DEFINED_TOKEN, BYTE_TOKEN = 3, 4, 6


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in the GGUF file at path as a Hugging Face folder into the existing, empty folder.

    Raises UserError if the file is unreadable, of another architecture, or holds an unsupported type.
    """
    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error}); download it again") from error
    meta = {name: field.contents() for name, field in reader.fields.items()}
    check_architecture(path, meta.get("general.architecture"))
    for tensor in reader.tensors:
        if tensor.tensor_type not in READABLE_TYPES:
            raise UserError(
                f"{path}: tensor {tensor.name} has GGUF type {tensor.tensor_type.name}; "
                f"supported are {', '.join(sorted(t.name for t in READABLE_TYPES))}"
            )
    config = _hf_config(path, meta, reader)
    kinds = {tensor.tensor_type for tensor in reader.tensors if (_hf_name(tensor.name) or "").endswith("_proj.weight")}
    if len(kinds) == 1 and (kind := kinds.pop()) in KEPT:
        config["quantization_config"] = KEPT[kind]
    _write_json(folder / "config.json", config)
    _write_tokenizer(path, meta, folder)
    _write_weights(reader, config, folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hf_config(path: Path, meta: dict[str, Any], reader: GGUFReader) -> dict[str, Any]:
    names = {tensor.name for tensor in reader.tensors}

    def required(key: str) -> Any:
        if key not in meta:
            raise UserError(f"{path}: GGUF metadata lacks {key}; download the file again or convert it anew")
        return meta[key]

    heads = required("llama.attention.head_count")
    hidden = required("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": required("llama.feed_forward_length"),
        "num_hidden_layers": required("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "rms_norm_eps": round(required("llama.attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0),
        "max_position_embeddings": required("llama.context_length"),
        "vocab_size": len(required("tokenizer.ggml.tokens")),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }
    config["rope_scaling"] = _rope_scaling(path, meta, config, reader)
    return config


def _rope_scaling(path: Path, meta: dict[str, Any], config: dict[str, Any], reader: GGUFReader) -> dict | None:
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta["llama.rope.scaling.factor"]}
    if kind != "none":
        raise UserError(f"{path}: llama.rope.scaling.type {kind!r} is not supported; expected 'none' or 'linear'")
    factors = next((np.array(t.data) for t in reader.tensors if t.name == "rope_freqs.weight"), None)
    if factors is None:
        return None
    # Llama 3.1+ files hold the divisor of each frequency instead of the four numbers it came from.
    # The largest divisor is the scaling factor; the other three are the same in every published model.
    scaling = RopeScaling("llama3", factor=float(factors.max()))
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": config["head_dim"]}  # the others do not matter here
    plain_config = ModelConfig(1, 1, 1, 1, **sizes, max_seq_len=1, rope_theta=config["rope_theta"])
    cpu = torch.device("cpu")
    plain = rope_frequencies(plain_config, cpu)
    scaled = rope_frequencies(replace(plain_config, rope_scaling=scaling), cpu)
    if factors.shape != tuple(plain.shape) or not np.allclose((plain / scaled).numpy(), factors, rtol=1e-3):
        raise UserError(f"{path}: rope_freqs.weight is not Llama 3's frequency scaling, the only one supported")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _hf_name(name: str) -> str | None:
    """model.layers.0.mlp.up_proj.weight for blk.0.ffn_up.weight; None for tensors the config already covers."""
    if name == "rope_freqs.weight":
        return None
    prefix = ""
    if name.startswith("blk."):
        _, layer, name = name.split(".", 2)
        prefix = f"model.layers.{layer}."
    stem, _, suffix = name.rpartition(".")
    if stem not in TENSOR_NAMES or suffix not in ("weight", "bias"):
        raise UserError(f"GGUF tensor {name} has no place in a llama model; only plain llama models are supported")
    return f"{prefix}{TENSOR_NAMES[stem]}.{suffix}"


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, CPU tensor) for each tensor of the file, one at a time."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in progress(reader.tensors, "converting GGUF", "tensor"):
        name = _hf_name(tensor.name)
        if name is None:
            continue
        count = heads.get(name.split(".")[-2])
        if "quantization_config" in config and name.endswith("_proj.weight"):
            values, scales = (_in_order(part, count).t() for part in _integers(tensor.data, tensor.tensor_type))
            parts = (
                as_gptq(values, scales) if tensor.tensor_type == GGMLQuantizationType.Q8_0 else as_awq(values, scales)
            )
            yield from ((name.removesuffix("weight") + part, packed.contiguous()) for part, packed in parts.items())
            continue
        data = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements=["C", "W"]))
        kept = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}
        yield name, _in_order(data, count).to(kept.get(tensor.tensor_type, torch.float16)).contiguous()


def _in_order(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows (head, pair, half) of q and k -> (head, half, pair); others, of no heads, as they are."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _integers(data: np.ndarray, kind: GGMLQuantizationType) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [N, K], int8 of Q8_0 and uint8 of Q4_0, and scales fp16 [N, K/32] of a tensor's rows of blocks."""
    size = 34 if kind == GGMLQuantizationType.Q8_0 else 18  # bytes, two of the scale before the integers
    blocks = torch.from_numpy(np.require(data, requirements=["C", "W"])).unflatten(1, (-1, size))
    scales, integers = blocks[:, :, :2].contiguous().view(torch.float16)[:, :, 0], blocks[:, :, 2:]
    if kind == GGMLQuantizationType.Q8_0:
        return integers.contiguous().view(torch.int8).flatten(1), scales
    return torch.cat((integers & 15, integers >> 4), dim=2).flatten(1), scales


def _write_weights(reader: GGUFReader, config: dict[str, Any], folder: Path) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, data in _tensors(reader, config):
        if pending and sum(t.nbytes for t in pending.values()) + data.nbytes > SHARD_BYTES:
            flush()
        pending[name] = data
        total += data.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"shard-{i}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _write_tokenizer(path: Path, meta: dict[str, Any], folder: Path) -> None:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(path, meta, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(meta, tokens)
    else:
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; expected 'gpt2' or 'llama'")
    types = meta.get("tokenizer.ggml.token_type", [])
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, y in zip(tokens, types, strict=False)
            if y == CONTROL_TOKEN
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, y in zip(tokens, types, strict=False) if y == USER_DEFINED_TOKEN]
    )
    bos_id = meta.get("tokenizer.ggml.bos_token_id")
    add_bos = meta.get("tokenizer.ggml.add_bos_token", kind == "llama")
    if add_bos and bos_id is not None:
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{role}_token_id"]]
        for role in ("bos", "eos")
        if f"tokenizer.ggml.{role}_token_id" in meta
    }
    chat = {"chat_template": meta["tokenizer.chat_template"]} if "tokenizer.chat_template" in meta else {}
    _write_json(folder / "tokenizer_config.json", special | chat)


def _byte_level_bpe(path: Path, meta: dict[str, Any], tokens: list[str]) -> Tokenizer:
    scheme = meta.get("tokenizer.ggml.pre", "default")
    byte_level: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = {"llama-bpe": LLAMA3_SPLIT}.get(scheme)
    if split is not None:
        byte_level = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif scheme == "smollm":
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif scheme not in ("gpt-2", "default"):
        raise UserError(f"{path}: tokenizer.ggml.pre {scheme!r} is not supported; expected gpt-2, smollm or llama-bpe")
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=scheme == "llama-bpe"))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(meta: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE as merges: a pair merges into a known piece, better-scored pieces first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = meta["tokenizer.ggml.scores"]
    merges = []
    for piece, i in vocab.items():
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(a, b) for a, b in halves if a in vocab and b in vocab]
        merges += [(-scores[i], i, vocab[a], vocab[b], (a, b)) for a, b in known]
    merges.sort()
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    byte_fallback = BYTE_TOKEN in meta.get("tokenizer.ggml.token_type", [])
    model = models.BPE(vocab, [m[-1] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
