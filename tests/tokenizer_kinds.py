"""Small tokenizers of every kind, each beside the one that transformers makes of the same vocabulary."""

import base64
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

from teal.checkpoint.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import TEXT, train_sentencepiece

SAMPLES = {
    "english": "The quick brown fox, 42 times; it's done.",
    "european": "Größenwahn — où est l'œuvre? ¿Qué? Ελληνικά, Русский язык",
    "asian": "東京は雨。今日の天気 — 中文测试 — 한국어 텍스트",
    "right-to-left": "مرحبا بالعالم، עברית",
    "indic": "नमस्ते दुनिया, தமிழ்",
    "code": "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # ok\n\n\n    indented\n",
    "emoji": "👩‍🚀🚀 family 👨‍👩‍👧‍👦 flag 🇪🇺 skin 👍🏽",
    "whitespace": "  leading, trailing  \n\n\ttab",
}
SPECIAL = ("<|im_start|>", "<|im_end|>")  # beside <s> and </s>
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


@dataclass(frozen=True)
class Kind:
    """One vocabulary: our tokenizer and transformers'."""

    ours: Tokenizer
    theirs: Any  # PreTrainedTokenizerBase, whose methods are typed too loosely to check

    def their_continuation(self, prompt: list[int], answer: list[int]) -> str:
        before = self.theirs.decode(prompt, skip_special_tokens=True)
        return self.theirs.decode(prompt + answer, skip_special_tokens=True)[len(before.rstrip("\ufffd")) :]


def tiktoken_file(vocabulary: int = 400) -> bytes:
    """Ranks of a byte-pair vocabulary: 256 bytes and merges of frequent neighbours in TEXT."""
    ranks: dict[bytes, int] = {bytes([i]): i for i in range(256)}
    words = [[bytes([b]) for b in word.encode()] for word in TEXT.replace("\n", " ").split(" ")]
    while len(ranks) < vocabulary:
        pairs: dict[bytes, int] = {}
        for word in words:
            for a, b in itertools.pairwise(word):
                pairs[a + b] = pairs.get(a + b, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[best] = len(ranks)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if word[i] + word[i + 1] == best:
                    word[i : i + 2] = [best]
                i += 1
        if max(map(len, words)) == 1:
            break
    return b"\n".join(base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()) + b"\n"


def sentencepiece_file(**options: Any) -> bytes:
    """A line's end is a byte, as Llama 2's, unless options make it a piece."""
    text = "\n".join([TEXT, *SAMPLES.values()])
    return train_sentencepiece(text, vocab_size=480, character_coverage=0.98, **options)


def _byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _llama2(metaspace: str | None) -> tokenizers.Tokenizer:
    """As Llama 2's tokenizer.json: a normalizer that prepends a space, or a pre-tokenizer with this scheme."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_file())
    vocabulary, merges = _pieces(processor)
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    if metaspace is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=metaspace, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _pieces(processor: sentencepiece.SentencePieceProcessor) -> tuple[dict[str, int], list[tuple[str, str]]]:
    extractor = SentencePieceExtractor.__new__(SentencePieceExtractor)  # its __init__ wants a file
    extractor.sp = processor
    vocabulary, _, merges = extractor.extract()
    return vocabulary, [pair for pair in merges if "".join(pair) not in ("<s>", "</s>", "<unk>")]


def _json_kind(folder: Path, inner: tokenizers.Tokenizer) -> Kind:
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    inner.add_tokens([AddedToken(t, normalized=False) for t in MARKERS])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    return Kind(load_tokenizer(folder), theirs)


def _declared(first: int) -> dict[str, Any]:
    tokens = dict.fromkeys(SPECIAL, True) | dict.fromkeys(MARKERS, False)
    return {str(first + i): {"content": name, "special": special} for i, (name, special) in enumerate(tokens.items())}


def _sentencepiece_kind(folder: Path, legacy: bool) -> Kind:
    (folder / "tokenizer.model").write_bytes(content := sentencepiece_file())
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    vocabulary, merges = _pieces(processor)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": legacy}
    declared = {"added_tokens_decoder": _declared(len(vocabulary))}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | declared))
    theirs: Any = transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=legacy)
    theirs.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL], special_tokens=True)
    theirs.add_tokens([AddedToken(t, normalized=False) for t in MARKERS])
    if legacy:  # as transformers converts a tokenizer.model: the space is added even where there is one
        theirs.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"\A▁"), "▁▁")]
        )
    return Kind(load_tokenizer(folder), theirs)


def _tiktoken_kind(folder: Path) -> Kind:
    (folder / "tokenizer.model").write_bytes(tiktoken_file())
    count = len(tiktoken_file().splitlines())
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    names = (*SPECIAL, *MARKERS)
    declared = {str(count + 20 + i): {"content": name, "special": True} for i, name in enumerate(names)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": declared}))
    ours = load_tokenizer(folder)
    extra = sorted(ours.backend.special, key=lambda name: ours.backend.special[name])
    converted = TikTokenConverter(str(folder / "tokenizer.model"), extra_special_tokens=extra).converted()
    return Kind(ours, transformers.PreTrainedTokenizerFast(tokenizer_object=converted, **config))


KINDS: dict[str, Callable[[Path], Kind]] = {
    "byte-level": lambda folder: _json_kind(folder, _byte_level()),
    "llama2-prepend": lambda folder: _json_kind(folder, _llama2(None)),
    "llama2-metaspace-first": lambda folder: _json_kind(folder, _llama2("first")),
    "llama2-metaspace-always": lambda folder: _json_kind(folder, _llama2("always")),
    "sentencepiece": lambda folder: _sentencepiece_kind(folder, legacy=False),
    "sentencepiece-legacy": lambda folder: _sentencepiece_kind(folder, legacy=True),
    "tiktoken": _tiktoken_kind,
}


def with_chat_template(make: Callable[[Path], Kind], folder: Path, template: str) -> Kind:
    """A kind of tokenizer with this chat template, here and in transformers."""
    make(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    kind = make(folder)
    kind.theirs.chat_template = template
    return kind
