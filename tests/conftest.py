"""Shared fixtures: tiny random models made by transformers, the default model, and a way to run the command lines."""

import functools
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the Triton kernels' tests then run on the CPU

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # They share the cores: threads of several teams would wait for each other. So do the commands that tests start.
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)

import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from teal.cli import command_line as cli
from teal.cli import generate
from tests import interpreter
from tests.forked import run_forked

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.quicken()
    interpreter.split_attention_less()

ROOT = Path(__file__).parent.parent
TEXT = (
    "The European lobster lives in the eastern Atlantic. It may grow to 60 cm and 6 kg.\n"
    "def f(x):\n    return x ** 2  # the square\n"
    "Größe, élan, naïve; Москва; 東京の天気は晴れ; العربية; हिन्दी; 👩‍🚀🚀 🙂!\n"
)


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # of the families here


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="test_faults.py, test_untrusted.py: all that they can try")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # not item.keywords, which have the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """torch.empty returns NaN within the test, so that reading memory nothing wrote fails it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# Of a tiny model that quantizes: the smallest group of weights divides every width.
QUANTIZABLE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny_config(family: str, **overrides: Any) -> transformers.PretrainedConfig:
    """A config of the family small enough to run in milliseconds, with odd sizes where the family allows them."""
    sizes: dict[str, Any] = {
        "vocab_size": 199,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if family not in ("llama", "mistral", "qwen2", "qwen3"):
        sizes["pad_token_id"] = 0  # theirs is beyond so small a vocabulary
    if family == "ministral":
        sizes["head_dim"] = 8  # which it does not infer
    return transformers.CONFIG_MAPPING[family](**(sizes | overrides))


def save_tiny_model(
    config: transformers.PretrainedConfig, folder: Path, **save_options: Any
) -> transformers.PreTrainedModel:
    """A random fp32 model of config, saved in folder. Weights are large enough that no block is a near-identity."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
            else:
                nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, **save_options)
    return model


def link_files(source: Path, to: Path, without: str = "") -> Path:
    """A folder, made if need be, with links to source's files, but for those whose names match a pattern."""
    to.mkdir(exist_ok=True)
    for file in source.iterdir():
        if not fnmatch(file.name, without):
            (to / file.name).symlink_to(file)
    return to


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of expected; NaN counts as infinite."""
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    return error if error == error else float("inf")


def assert_near(name: str, actual: Tensor, expected: Tensor, limit: float) -> None:
    """Fail, naming the tensor, unless its relative_error is at most limit."""
    error = relative_error(actual, expected)
    assert error <= limit, f"{name}: relative error {error:.1e}, at most {limit:.0e} was expected"


@pytest.fixture(scope="session")
def byte_level_tokenizer_json() -> str:
    """A byte-level BPE tokenizer.json trained on TEXT, 199 words long at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def train_sentencepiece(text: str, **options: Any) -> bytes:
    """A SentencePiece BPE tokenizer.model with byte fallback, trained on text, that changes no character."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in text.splitlines() if line),
        model_writer=out,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A SentencePiece model trained on TEXT."""
    return train_sentencepiece(8 * TEXT, vocab_size=420, character_coverage=0.98, split_digits=True)


@pytest.fixture(scope="session")
def quantizable_folder(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer_json: str) -> Path:
    """A checkpoint whose widths are multiples of 32, with q, k and v biases."""
    folder = tmp_path_factory.mktemp("quantizable")
    config = tiny_config("qwen2", **QUANTIZABLE, vocab_size=320, max_position_embeddings=400, tie_word_embeddings=True)
    save_tiny_model(config, folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer_json: str) -> Path:
    """A complete checkpoint folder: tiny Llama, tokenizer, chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(tiny_config("llama", vocab_size=300, max_position_embeddings=400), folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


def own_cache(folder: Path) -> Path:
    """A cache folder for a test's own XDG_CACHE_HOME, empty but for the CPU kernels: compiling them takes 25 s."""
    from teal.files import cache_folder

    (folder / "teal").mkdir(parents=True)
    (folder / "teal" / "kernels").symlink_to(cache_folder("kernels"))
    return folder


@pytest.fixture(scope="session")
def default_folder() -> Path:
    """The default model's folder, downloaded on first use."""
    from teal.checkpoint.source import default_model

    return default_model()


def float_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's folder by name; a GGUF file's integers as the floats that they stand for."""
    from teal.checkpoint.weights import find_shards, open_shard

    found: dict[str, Tensor] = {}
    for path in find_shards(folder):
        with open_shard(path) as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - no dict
    return found


@pytest.fixture(scope="session")
def default_floats(default_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model in fp16, as transformers reads it."""
    folder = link_files(default_folder, tmp_path_factory.mktemp("floats"), "*.safetensors*")
    save_file(float_tensors(default_folder), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def shallow_folder(default_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 2 of the default model's 30 layers, in a cache as shallow_cache."""
    from teal.checkpoint.blocks import Shard, open_file, save_shard
    from teal.checkpoint.weights import find_shards

    layers, cache = 2, own_cache(tmp_path_factory.mktemp("shallow") / "cache")
    folder = cache / "teal" / "models" / default_folder.name
    folder.mkdir(parents=True)
    for file in default_folder.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((default_folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
    [path] = find_shards(default_folder)
    with open_file(path) as tensors:
        shard = Shard(tensors, path, {})
        numbers = {name: re.search(r"layers\.(\d+)\.", name) for name in shard.keys()}  # noqa: SIM118 - no dict
        names = [name for name, found in numbers.items() if found is None or int(found[1]) < layers]
        save_shard({name: shard.stored(name) for name in names}, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def shallow_cache(shallow_folder: Path) -> Path:
    """A cache for XDG_CACHE_HOME whose default model is shallow_folder: commands take a quarter."""
    return shallow_folder.parents[2]


DEFAULT_OR_SHALLOW = pytest.mark.parametrize(
    "real_folder", ["shallow_folder", pytest.param("default_folder", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def real_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of the fixture that a test names."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> None:
    """The CPU kernels are in the cache before any test: a command that compiles them says so and takes its time."""
    from teal.kernels.cpu.native import native_kernels

    native_kernels()


@pytest.fixture(autouse=True)
def signal_handlers_end_with_a_test() -> Iterator[None]:
    """A command that a test calls in this process installs its own for good; other tests send themselves signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.set_wakeup_fd(-1)


@pytest.fixture
def call_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:  # fmt: skip
    """Call main() of a command line in this process, where torch is imported: (exit code, stdout, stderr).

    It reads stdin, if that is given, as from a pipe.
    """

    def call(main: Callable[[], None], *arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.run(main)
        out, err = capsys.readouterr()
        return int(exit_info.value.code or 0), out, err

    return call


@pytest.fixture
def invoke(call_main: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """call_main of generate.py."""
    return functools.partial(call_main, generate.main)


def save_uniform_plan(folder: Path, sparsity: float, path: Path, device: str = "cpu") -> str:
    """The path of a quick uniform plan for the model in folder, calibrated in fp32 on device.

    Quick plans are global ones elsewhere, which differ from device to device: labels are drawn by chance.
    """
    from teal.calibration.texts import default_text
    from teal.calibration.thresholds import calibrate_quickly
    from teal.checkpoint.loading import load_for_decoding
    from teal.options import ModelOptions, Settings

    loaded = load_for_decoding(ModelOptions(str(folder), device=device, dtype="fp32"), sparse=True)
    settings = Settings((sparsity,), "uniform")
    calibrate_quickly(loaded.model, loaded.tokenizer.encode, settings, default_text(), loaded.weights).save(path)
    return str(path)


def assert_one_line_error(code: int, err: str, *fragments: str) -> None:
    """A user's mistake: nonzero exit, one line on stderr that names what is wrong, no traceback."""
    assert code in (1, 2), err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for fragment in fragments:
        assert fragment in lines[0], f"{fragment!r} not in {lines[0]!r}"


def changed(content: Any, path: list[int], value: Any) -> Any:
    """content with the value at a path (indices, modulo what is there) replaced."""
    if not path or not isinstance(content, (dict, list)) or not content:
        return value
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key = keys[path[0] % len(keys)]
    copy: Any = dict(content) if isinstance(content, dict) else list(content)
    copy[key] = changed(content[key], path[1:], value)
    return copy


def file_size_limit(count: int) -> Callable[[], None]:
    """For a child process's preexec_fn: writing beyond count bytes fails as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))

    return limit


def logits_of_ranks(cases: Mapping[str, dict[str, object]], ranks: int, folder: Path) -> list[dict[str, Tensor]]:
    """What each of so many processes of torchrun has as logits_of (tests/ranks.py) of the cases."""
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.ranks")
    done = run_command(*launcher, folder / "cases.json", timeout=300, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{i}.pt") for i in range(ranks)]


def run_command(
    *arguments: str | Path, stdin: str | bytes = "", timeout: float = 180, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """As `python generate.py`, or with -m or -c as the first argument, in the repository root (see forked.py)."""
    script = () if arguments and arguments[0] in ("-m", "-c") else ("generate.py",)
    content = stdin.encode() if isinstance(stdin, str) else stdin
    return run_forked(ROOT, (*script, *map(str, arguments)), content, timeout, os.environ | environment)
