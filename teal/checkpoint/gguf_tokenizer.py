"""The tokenizer in a GGUF file's metadata -> tokenizer.json and tokenizer_config.json of a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from teal.checkpoint.gguf_config import Metadata
from teal.checkpoint.token_backends import LLAMA3_PATTERN
from teal.errors import UserError
from teal.files import write_json

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(suffix: str, digits: str) -> str:
    """Words that end where a capital follows a small letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{UPPER}*{LOWER}+{suffix}|{start}{UPPER}+{LOWER}*{suffix}"
    return words + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How text is split before byte-level BPE: by a regular expression, by GPT-2's without one.

    single_digits: each digit is a piece, by GPT-2's expression otherwise. whole: a piece that is a token is not merged
    anew. begins: a text begins with the beginning-of-text token unless the file says otherwise.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole: bool = False
    begins: bool = False
    normalizer: normalizers.Normalizer | None = None


GPT2, DIGITS, LLAMA = Scheme(), Scheme(single_digits=True), Scheme(LLAMA3_PATTERN)
QWEN = Scheme(CONTRACTIONS + WORDS + r"|\p{N}" + REST, normalizer=normalizers.NFC())
# By the name that GGUF gives the scheme (llama.cpp, llm_tokenizer_bpe).
SCHEMES = {
    "gpt-2": GPT2, "default": GPT2, "olmo": GPT2,
    "smollm": DIGITS, "refact": DIGITS, "starcoder": DIGITS, "command-r": DIGITS,
    "llama-bpe": Scheme(LLAMA3_PATTERN, whole=True, begins=True),
    "dbrx": LLAMA, "smaug-bpe": LLAMA, "chatglm-bpe": LLAMA,
    "qwen2": QWEN, "deepseek-r1-qwen": QWEN, "stablelm2": QWEN,
    "tekken": Scheme(_cased("", r"|\p{N}"), whole=True, begins=True),
    "gpt-4o": Scheme(_cased(f"{CONTRACTIONS}?", r"|\p{N}{1,3}")),
}  # fmt: skip
NORMAL_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN, BYTE_TOKEN = 1, 3, 4, 6


def _token_types(meta: Metadata) -> list[int]:
    """The type of each token. Those that end a generation are control tokens, whatever the file says: some say text."""
    types = list(meta.entries.get("tokenizer.ggml.token_type", [])) or [NORMAL_TOKEN] * len(meta.tokens)
    for i in meta.end_ids():
        types[i] = CONTROL_TOKEN
    return types


def write_tokenizer(meta: Metadata, folder: Path) -> None:
    """Write both files. Raises UserError for a tokenizer of another kind, or a damaged one."""
    path, tokens = meta.path, meta.tokens
    kind = meta.entries.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; expected 'gpt2' or 'llama'")
    try:
        tokenizer = _byte_level_bpe(meta) if kind == "gpt2" else _sentencepiece_bpe(meta)
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
    bos_id = meta.token_id("bos")
    begins = kind == "llama" or _scheme(meta).begins
    add_bos = meta.entries.get("tokenizer.ggml.add_bos_token", begins)
    if add_bos and bos_id is not None:
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, bos_id)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{role}_token": tokens[i] for role in ("bos", "eos") if (i := meta.token_id(role)) is not None}
    write_json(folder / "tokenizer_config.json", special | _chat_templates(meta.entries))


def _chat_templates(meta: dict[str, Any]) -> dict[str, Any]:
    """The chat_template of tokenizer_config.json: a text, or a list if the file has further ones by name (tool_use)."""
    default, prefix = meta.get("tokenizer.chat_template"), "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in meta.items() if key.startswith(prefix)}
    if not named:
        return {} if default is None else {"chat_template": default}
    named = ({} if default is None else {"default": default}) | named
    return {"chat_template": [{"name": name, "template": text} for name, text in named.items()]}


def _scheme(meta: Metadata) -> Scheme:
    name = meta.entries.get("tokenizer.ggml.pre", "default")
    if name not in SCHEMES:
        raise UserError(f"{meta.path}: tokenizer.ggml.pre {name!r} is not supported; expected {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _byte_level_bpe(meta: Metadata) -> Tokenizer:
    scheme = _scheme(meta)
    own: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    if scheme.pattern is not None:
        own = pre_tokenizers.Split(Regex(scheme.pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=scheme.pattern is None)
    is_split = scheme.pattern is not None or scheme.single_digits
    merges = [tuple(merge.split(" ", 1)) for merge in meta.required("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(meta.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=scheme.whole))
    if scheme.normalizer is not None:
        tokenizer.normalizer = scheme.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([own, byte_level]) if is_split else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(meta: Metadata) -> Tokenizer:
    """SentencePiece BPE as merges: a pair merges into a known piece, better-scored pieces first."""
    vocab = {token: i for i, token in enumerate(meta.tokens)}
    scores = meta.required("tokenizer.ggml.scores")
    merges = []
    for piece, i in vocab.items():
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(a, b) for a, b in halves if a in vocab and b in vocab]
        merges += [(-scores[i], i, vocab[a], vocab[b], (a, b)) for a, b in known]
    merges.sort()
    unknown = meta.tokens[meta.token_id("unknown") or 0]
    byte_fallback = BYTE_TOKEN in _token_types(meta)
    model = models.BPE(vocab, [m[-1] for m in merges], unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend("▁")] if meta.entries.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer
