"""GGUF file (llama architecture) -> a folder as Hugging Face has them: config, safetensors, tokenizer.

The `gguf` package reads the tensors. This module only renames them, undoes the row permutation of q and k, and rebuilds
`tokenizer.json` from the vocabulary in the metadata. llama.cpp permutes those rows for its interleaved rotary
embedding. Integers and scales of quantized types stay as they are, in a layout of our own (blocks.py). A tensor that
reaches beyond fp16 becomes fp32.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from teal.checkpoint.blocks import fits_half, save_shard
from teal.checkpoint.config import SIZELESS
from teal.checkpoint.gguf_header import check_architecture
from teal.checkpoint.gguf_parts import read_parts
from teal.checkpoint.weights import is_finite
from teal.errors import UserError
from teal.kernels.formats.blocks import BLOCK_TYPES, Blocks, pack
from teal.model import RopeScaling, rope_frequencies
from teal.progress import progress

READABLE_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)
SHARD_BYTES = 2 << 30  # bounds host memory: one shard is held while it is written

# GGUF's names of projections, by ours.
PROJECTION_NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
} | {
    PROJECTION_NAMES[name]: hf_name
    for p in SIZELESS.projections()
    for name, hf_name in zip(p.names, p.hf_names, strict=True)
}

# Regular expressions that split text before byte-level BPE, by the name GGUF gives the scheme.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS_SCHEMES = ("llama-bpe",)  # with a beginning-of-text token unless the file says otherwise
NORMAL_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN, BYTE_TOKEN = 1, 3, 4, 6
# Ends of a turn, a message or a text, which llama.cpp knows by name, too: a file may declare one of several. Not </s>,
# which is plain text in some vocabularies.
END_TOKENS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>"),
        *("<|end_of_turn|>", "<end_of_turn>", "<｜end▁of▁sentence｜>"),
    )
)


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in the GGUF file at path, which may be one part of several, as a Hugging Face folder.

    folder is empty before. Raises UserError if the file is unreadable, of another architecture, or holds an unsupported
    type or a NaN, or if a part is missing.
    """
    meta, tensors = read_parts(path)
    check_architecture(path, meta.get("general.architecture"))
    for tensor in tensors:
        if tensor.tensor_type not in READABLE_TYPES:
            raise UserError(
                f"{path}: tensor {tensor.name} has GGUF type {tensor.tensor_type.name}; "
                f"supported are {', '.join(sorted(t.name for t in READABLE_TYPES))}"
            )
    config = _hf_config(path, meta, tensors)
    _write_json(folder / "config.json", config)
    end_ids = _end_ids(meta)
    _write_json(folder / "generation_config.json", {"bos_token_id": config["bos_token_id"], "eos_token_id": end_ids})
    _write_tokenizer(path, meta, folder)
    _write_weights(path, tensors, config, folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _hf_config(path: Path, meta: dict[str, Any], tensors: list[ReaderTensor]) -> dict[str, Any]:
    names = {tensor.name for tensor in tensors}

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
        "bos_token_id": _token_id(meta, "bos"),
        "eos_token_id": _token_id(meta, "eos"),
    }
    config["rope_scaling"] = _rope_scaling(path, meta, config, tensors)
    return config


def _token_id(meta: dict[str, Any], role: str) -> int | None:
    """The id of bos, eos, eot (end of turn), eom (end of message) or unknown; None for one that is no token, as -1."""
    found = meta.get(f"tokenizer.ggml.{role}_token_id")
    return int(found) if found is not None and 0 <= found < len(meta["tokenizer.ggml.tokens"]) else None


def _end_ids(meta: dict[str, Any]) -> list[int]:
    """Tokens that end a generation: those the metadata names, and those of a well-known name."""
    named = [_token_id(meta, role) for role in ("eos", "eot", "eom")]
    ids = {i for i in named if i is not None}
    return sorted(ids | {i for i, token in enumerate(meta["tokenizer.ggml.tokens"]) if token in END_TOKENS})


def _token_types(meta: dict[str, Any]) -> list[int]:
    """The type of each token. Those that end a generation are control tokens, whatever the file says: some say text."""
    tokens = meta["tokenizer.ggml.tokens"]
    types = list(meta.get("tokenizer.ggml.token_type", [])) or [NORMAL_TOKEN] * len(tokens)
    for i in _end_ids(meta):
        types[i] = CONTROL_TOKEN
    return types


def _rope_scaling(
    path: Path, meta: dict[str, Any], config: dict[str, Any], tensors: list[ReaderTensor]
) -> dict[str, Any] | None:  # fmt: skip
    kind = meta.get("llama.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta["llama.rope.scaling.factor"]}
    if kind != "none":
        raise UserError(f"{path}: llama.rope.scaling.type {kind!r} is not supported; expected 'none' or 'linear'")
    factors = next((np.array(t.data) for t in tensors if t.name == "rope_freqs.weight"), None)
    if factors is None:
        return None
    # Llama 3.1+ files hold the divisor of each frequency instead of the four numbers it came from.
    # The largest divisor is the scaling factor; the other three are the same in every published model.
    scaling = RopeScaling("llama3", factor=float(factors.max()))
    plain_config = replace(SIZELESS, head_dim=config["head_dim"], rope_theta=config["rope_theta"])
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
    """The Hugging Face name of a GGUF tensor, as blk.0.attn_norm.weight; None for those the config covers already."""
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


def _tensors(
    path: Path, tensors: list[ReaderTensor], config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor | Blocks]]:  # fmt: skip
    """(HF name, CPU tensor or weight in blocks) for each tensor of the file, one at a time.

    Raises UserError if one is not finite.
    """
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}  # whose channels rotate
    counts = {PROJECTION_NAMES[name]: count for name, count in heads.items()}
    for tensor in progress(tensors, "converting GGUF", "tensor"):
        name = _hf_name(tensor.name)
        if name is None:
            continue
        count = counts.get(tensor.name.split(".")[-2])
        if (kind := tensor.tensor_type.name) in BLOCK_TYPES:
            rows = torch.from_numpy(np.require(tensor.data, requirements=["C", "W"]))
            weight = pack(kind, _in_order(rows, count))
            if fits_half(weight):
                yield name, weight
                continue
        data = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements=["C", "W"]))
        if not is_finite(data):
            raise _not_finite(path, tensor)
        kept = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}
        stored = data.to(kept.get(tensor.tensor_type, torch.float16))
        stored = stored if is_finite(stored) else data  # beyond fp16: scales of K-quants are products
        yield name, _in_order(stored, count).contiguous()


def _not_finite(path: Path, tensor: ReaderTensor) -> UserError:
    return UserError(f"{path}: tensor {tensor.name} holds NaN or infinity; the file is damaged, download it again")


def _in_order(rows: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Rows (head, pair, half) of q and k -> (head, half, pair); others, of no heads, as they are."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _write_weights(path: Path, tensors: list[ReaderTensor], config: dict[str, Any], folder: Path) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor | Blocks] = {}
    total = waiting = 0  # bytes

    def flush() -> None:
        save_shard(pending, folder / f"shard-{len(shards)}.safetensors")
        shards.append(list(pending))
        pending.clear()

    for name, data in _tensors(path, tensors, config):
        size = (data.data if isinstance(data, Blocks) else data).nbytes
        if pending and waiting + size > SHARD_BYTES:
            flush()
            waiting = 0
        pending[name] = data
        total, waiting = total + size, waiting + size
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
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; expected 'gpt2' or 'llama'")
    try:
        tokenizer = _byte_level_bpe(path, meta, tokens) if kind == "gpt2" else _sentencepiece_bpe(meta, tokens)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: the tokenizer in its metadata is damaged ({error}); download it again") from error
    types = _token_types(meta)
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, y in zip(tokens, types, strict=True)
            if y == CONTROL_TOKEN
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, y in zip(tokens, types, strict=True) if y == USER_DEFINED_TOKEN]
    )
    bos_id = _token_id(meta, "bos")
    add_bos = meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or meta.get("tokenizer.ggml.pre") in BOS_SCHEMES)
    if add_bos and bos_id is not None:
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{role}_token": tokens[i] for role in ("bos", "eos") if (i := _token_id(meta, role)) is not None}
    _write_json(folder / "tokenizer_config.json", special | _chat_templates(meta))


def _chat_templates(meta: dict[str, Any]) -> dict[str, Any]:
    """The chat_template of tokenizer_config.json: a text, or a list if the file has further ones by name (tool_use)."""
    default, prefix = meta.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in meta.items() if key.startswith(prefix)}
    if not named:
        return {} if default is None else {"chat_template": default}
    named = ({} if default is None else {"default": default}) | named
    return {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}


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
    unknown = tokens[_token_id(meta, "unknown") or 0]
    byte_fallback = BYTE_TOKEN in _token_types(meta)
    model = models.BPE(vocab, [m[-1] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
