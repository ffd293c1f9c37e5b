"""vocab.json and merges.txt, the files of byte-level BPE before tokenizer.json -> the content of a tokenizer.json.

They do not say how text is split into words; tokenizer_config.json does, by naming a class of transformers.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from teal.checkpoint.config import read_json
from teal.errors import UserError

FILES = ("vocab.json", "merges.txt")
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLASSES = {"Qwen2Tokenizer": "qwen", "GPT2Tokenizer": "gpt2"}  # also with Fast behind it


def has_vocab_and_merges(folder: Path) -> bool:
    """Whether both files are there."""
    return all((folder / name).is_file() for name in FILES)


def as_tokenizer_json(folder: Path, config: dict[str, Any]) -> bytes:
    """The content of the tokenizer.json that stands for folder's files; config: its tokenizer_config.json.

    Raises UserError for a class unknown here, and for damaged files.
    """
    name = config.get("tokenizer_class")
    kind = CLASSES.get(name.removesuffix("Fast")) if isinstance(name, str) else None
    if kind is None:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class {name!r} with vocab.json is not supported; "
            f"expected {' or '.join(CLASSES)}, or a tokenizer.json"
        )
    vocab = read_json(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(vocab, pairs))  # type: ignore[arg-type]
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(
            f"{folder / 'merges.txt'}: not readable with vocab.json ({error}); download both again"
        ) from error
    splits = kind == "qwen"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    if splits:
        own = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([own, tokenizer.pre_tokenizer])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for i, token, is_special in _added(folder, config):
        added = AddedToken(token, normalized=False, special=is_special)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(token) != i:
            raise UserError(f"{folder}: added token {token!r:.80} has id {i}; expected {tokenizer.token_to_id(token)}")
    return tokenizer.to_str().encode()


def _added(folder: Path, config: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """Ids, texts and whether they are special, by id; older folders have them in a file of their own."""
    declared = config.get("added_tokens_decoder")
    try:
        if declared:
            return sorted((int(i), str(t["content"]), bool(t.get("special"))) for i, t in declared.items())
        path = folder / "added_tokens.json"
        return sorted((int(i), str(token), False) for token, i in (read_json(path) if path.is_file() else {}).items())
    except (AttributeError, TypeError, KeyError, ValueError):
        raise UserError(f"{folder}: its added tokens are not usable; expected token objects by id") from None
