"""Whatever a file or a command line holds, a command answers or says in one line what is wrong, without a traceback.

CI tries a few dozen examples of each kind. pytest tests/checkpoint/test_untrusted.py --full tries thousands, for ten
minutes.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from teal.cli import calibrate, evaluate, generate, quantize, serve
from teal.plan import ProjectionPlan, SparsityPlan
from tests.conftest import PROJECTIONS, assert_one_line_error, changed, link_files

Command = Callable[..., tuple[int, str, str]]

DEEP = "@deep"  # stands for a list nested 100,000 deep, which no JSON library can write
NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), float("inf"), 0.5, True])
TEXTS = st.text(max_size=8) | st.sampled_from(["", "\0", "\ud800", "\u2028", "a" * 5000, DEEP])
VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
PATHS = st.lists(st.integers(0, 50), max_size=4)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)
    path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Fuzzer:
    """Runs a property on a few examples, or with --full on many."""

    full: bool

    def run(self, property: Callable[..., None], count: int) -> None:
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.nested_given]
        settings(max_examples=count * 50 if self.full else count, deadline=None, suppress_health_check=checks)(
            property
        )()


@pytest.fixture
def fuzzer(request: pytest.FixtureRequest) -> Fuzzer:
    return Fuzzer(bool(request.config.getoption("--full")))


@pytest.fixture
def call(call_main: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """call_main, without a terminal, in a folder of its own; a refusal is one line."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.stdin", None)

    def checked(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        code, out, err = call_main(main, *arguments)
        assert code in (0, 1, 2)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        refuses_message = "--chat" in arguments and len(errors) == 1  # which ends no chat
        assert (len(errors) == (code != 0) or refuses_message) and "Traceback" not in err, err
        return code, out, err

    return checked


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A checkpoint whose configs are its own."""
    copy = link_files(tiny_folder, tmp_path / "model")
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    templates = [{"name": "default", "template": template}, {"name": "tool_use", "template": template}]
    contents = {
        "config.json": json.loads((tiny_folder / "config.json").read_text()) | {"bos_token_id": 1, "eos_token_id": [2]},
        "generation_config.json": {"eos_token_id": 2, "temperature": 0.6},
        "tokenizer_config.json": tokens | {"chat_template": templates, "added_tokens_decoder": {}},
    }
    for name, content in contents.items():
        (copy / name).unlink(missing_ok=True)
        write_json(copy / name, content)
    return copy


QUICK = ("--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "2", "--no-compile")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("how", [("--prompt", "The"), ("--chat", "--prompt", "The")], ids=["prompt", "chat"])
def test_any_config_of_a_checkpoint(
    name: str, how: tuple[str, ...], folder: Path, call: Command, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = json.loads((folder / name).read_text(encoding="utf-8"))

    @given(path=PATHS, value=VALUES)
    def property(path: list[int], value: Any) -> None:
        write_json(folder / name, changed(original, path, value))
        with (folder / "empty").open("w+") as empty:
            monkeypatch.setattr("sys.stdin", empty)  # a chat's end
            call(generate.main, "--checkpoint", folder, *QUICK, *how)

    fuzzer.run(property, 25)


def test_a_context_that_no_message_fits(folder: Path, call: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1}
    write_json(folder / "config.json", config)
    with (folder / "empty").open("w+") as empty:
        monkeypatch.setattr("sys.stdin", empty)
        code, out, err = call(generate.main, "--checkpoint", folder, *QUICK, "--chat", "--prompt", "The")
    assert (code, out) == (0, "") and "fit the model's context of 1" in err


@pytest.fixture
def plan(tiny_folder: Path) -> dict[str, Any]:
    layer = {name: ProjectionPlan(0.5, 0.1, 0.5) for name in PROJECTIONS}
    fields = {"hidden_size": 48, "rope_scaling": None}
    made = SparsityPlan(fields, "uniform", 0.5, (layer,) * 3, calibration={"text": "x", "sequences": 2})
    path = tiny_folder.parent / "a-plan.json"
    made.save(path)
    return json.loads(path.read_text(encoding="utf-8"))


def test_any_plan(plan: dict[str, Any], tmp_path: Path, tiny_folder: Path, call: Command, fuzzer: Fuzzer) -> None:
    file = tmp_path / "plan.json"

    @given(path=PATHS, value=VALUES)
    def property(path: list[int], value: Any) -> None:
        write_json(file, changed(plan, path, value))
        shown, _, _ = call(calibrate.main, "--show", file)
        used, _, _ = call(generate.main, "--checkpoint", tiny_folder, *QUICK, "--prompt", "The", "--plan", file)
        assert shown == 0 or used != 0

    fuzzer.run(property, 40)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format": ' + "[" * 100_000, "9" * 10_000, '"\\ud800"', "nan"])
def test_hopeless_plans(content: str, tmp_path: Path, call: Command) -> None:
    (tmp_path / "plan.json").write_text(content)
    code, out, err = call(calibrate.main, "--show", tmp_path / "plan.json")
    assert out == ""
    assert_one_line_error(code, err, "plan.json")


WRONG = {
    "achieved": ("layers", 0, "q", "achieved"),
    "threshold": ("layers", 0, "q", "threshold"),
    "sparsity": ("layers", 0, "q", "sparsity"),
    "method": ("method",),
    "calibration": ("calibration",),
    "model": ("model",),
    "target": ("target",),
}


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize(
    "value", ["a string", 10**400, [1], {"a": 1}, True], ids=["str", "huge", "list", "dict", "bool"]
)
def test_a_plan_with_a_wrong_type_is_named(
    field: str, value: Any, plan: dict[str, Any], tmp_path: Path, call: Command
) -> None:
    if (field, type(value)) in {("method", str), ("calibration", dict), ("model", dict)}:
        pytest.skip("right type")
    inner: Any = plan
    *path, last = WRONG[field]
    for key in path:
        inner = inner[key]
    inner[last] = value
    write_json(tmp_path / "plan.json", plan)
    code, out, err = call(calibrate.main, "--show", tmp_path / "plan.json")
    assert out == ""
    assert_one_line_error(code, err, "plan.json", "sparsity" if field == "target" else field)


def test_any_text_file(tmp_path: Path, tiny_folder: Path, call: Command, fuzzer: Fuzzer) -> None:
    options = ("--checkpoint", tiny_folder, "--device", "cpu", "--dtype", "fp32", "--tokens", "8", "--sparsity", "0")
    lines = st.dictionaries(st.sampled_from(["text", "x"]), VALUES, max_size=2).map(json.dumps) | st.text(max_size=20)

    @given(content=st.lists(lines | st.just(DEEP), max_size=4), raw=st.binary(max_size=20))
    def property(content: list[str], raw: bytes) -> None:
        text = "\n".join(content).replace(DEEP, "[" * 100_000)
        for name in ("text.jsonl", "text.txt"):
            (tmp_path / name).write_bytes(text.encode("utf-8", errors="surrogatepass") + raw)
            call(evaluate.main, *options, "--text", tmp_path / name)

    fuzzer.run(property, 30)


MAINS = {
    generate.main: ("--prompt", "The", "--max-new-tokens", "2", "--device", "cpu", "--no-compile", "--dtype", "fp32"),
    calibrate.main: ("--sequences", "1", "--length", "16", "--device", "cpu", "--dtype", "fp32", "-o", "here"),
    evaluate.main: ("--tokens", "16", "--device", "cpu", "--dtype", "fp32", "--sparsity", "0"),
    quantize.main: ("--mode", "int8", "-o", "here"),
    serve.main: ("--checkpoint", "/no/such/model"),  # a good one would serve
}
# They take minutes, print scripts, or compile.
LEFT_OUT = {
    "--help", "--version", "--print-completion", "--compile", "--no-compile", "--lm-eval", "--draft-quant",
    "--tensor-parallel",  # which starts processes of pytest's own command line
}  # fmt: skip


def takes_long(name: str, value: str) -> bool:
    """Whether it asks for many tokens to be scored, which is right and takes hours with a stride of one."""
    try:
        return name in ("--tokens", "--decode-tokens") and int(value) > 64
    except ValueError:
        return False


@pytest.mark.parametrize("main", MAINS, ids=lambda main: main.__module__)
def test_any_command_line(main: Callable[[], None], tiny_folder: Path, call: Command, fuzzer: Fuzzer) -> None:
    parser = {m: m.__globals__["build_parser"] for m in MAINS}[main]()
    options = {a.option_strings[-1]: a for a in parser._actions if a.option_strings}
    numbers = NUMBERS.map(str) | st.integers().map(str) | st.floats().map(str)
    values = (
        st.text(max_size=12) | numbers | st.sampled_from(["\udcff", "\0", "9" * 5000, "1,2,", "0.1,nan", "/dev/null"])
    )
    chosen = st.sampled_from(sorted(set(options) - LEFT_OUT))

    @given(pairs=st.lists(st.tuples(chosen, values), min_size=1, max_size=3))
    def property(pairs: list[tuple[str, str]]) -> None:
        arguments = ["--checkpoint", str(tiny_folder), *MAINS[main]]
        assume(not any(takes_long(*pair) for pair in pairs))
        for name, value in pairs:
            arguments += [name] if options[name].nargs == 0 else [name, value]
        call(main, *arguments)
        shutil.rmtree("here", ignore_errors=True)

    fuzzer.run(property, 40)


@pytest.mark.parametrize("option", ["--prompt", "--stop", "--system", "--checkpoint", "--plan", "--prompt-file"])
@pytest.mark.parametrize("value", ["caf\udce9", "a\0b"], ids=["latin-1", "nul"])
def test_an_argument_that_is_no_text_is_named(option: str, value: str, call: Command) -> None:
    code, out, err = call(generate.main, option, value)
    assert out == ""
    assert_one_line_error(code, err, f"{option}: ", "not UTF-8")


def test_any_gguf_file(tmp_path: Path, call: Command, fuzzer: Fuzzer) -> None:
    key = b"general.architecture"
    header = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    entry = len(key).to_bytes(8, "little") + key + (8).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"mamba"
    whole = header + entry

    @given(at=st.integers(4, len(whole)), patch=st.binary(max_size=12), rest=st.binary(max_size=40), keep=st.booleans())
    def property(at: int, patch: bytes, rest: bytes, keep: bool) -> None:
        content = whole[:at] + patch + (whole[at + len(patch) :] if keep else rest)
        (tmp_path / "model.gguf").write_bytes(content)
        code, out, err = call(generate.main, "--checkpoint", tmp_path / "model.gguf", "--prompt", "a")
        assert out == ""
        assert_one_line_error(code, err, "model.gguf")

    fuzzer.run(property, 50)


@pytest.mark.parametrize("host", ["\ufff9", "a" * 100, "a..b"], ids=["no-character", "too-long", "empty-label"])
def test_a_host_that_is_no_name_is_refused(host: str, call: Command) -> None:
    code, _, err = call(serve.main, "--checkpoint", "/no/such/model", "--host", host)
    assert_one_line_error(code, err, "--host", "no host name")
