"""The command line as a user meets it: answers, and one clear line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teal.cli import command_line as cli
from teal.cli import generate
from teal.decoding import engine
from tests.conftest import ROOT, assert_one_line_error, link_files, own_cache, run_command

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[str, ...]:
    return ("--checkpoint", str(tiny_folder), "--device", "cpu", "--dtype", "fp32")


def test_text_to_stdout_statistics_to_stderr(tiny: tuple[str, ...], invoke: Invoke) -> None:
    code, out, err = invoke(*tiny, "--prompt", "The lobster", "--max-new-tokens", "8", "--ignore-eos")
    assert code == 0 and out.strip()
    assert "8 tokens" in err and "tok/s" in err and "first token" in err


def test_prompt_from_file_and_stdin(tiny: tuple[str, ...], tmp_path: Path, invoke: Invoke) -> None:
    options = (*tiny, "--max-new-tokens", "8", "--ignore-eos")
    (tmp_path / "prompt").write_text("Größe\n", encoding="utf-8")
    from_file = run_command(*options, "--prompt-file", tmp_path / "prompt")
    from_stdin = run_command(*options, stdin="Größe\n")
    _, from_option, _ = invoke(*options, "--prompt", "Größe\n")
    assert from_file.returncode == 0 and from_file.stdout.strip()
    assert from_file.stdout == from_stdin.stdout == from_option.encode()


def test_json_is_one_object_with_text_and_statistics(tiny: tuple[str, ...], invoke: Invoke) -> None:
    options = (*tiny, "--prompt", "A", "--max-new-tokens", "6", "--ignore-eos")
    _, streamed, _ = invoke(*options)
    code, out, _ = invoke(*options, "--json", "--stats", "--sparsity", "0.5")
    assert code == 0
    result = json.loads(out)
    assert result["prompt"] == "A" and result["new_tokens"] == 6 and result["finish_reason"] == "length"
    assert result["tokens_per_s"] > 0 and result["gb_per_s"] > 0 and result["bandwidth_share"] > 0
    assert [set(layer) for layer in result["achieved_sparsity"]] == [{"q", "k", "v", "o", "gate", "up", "down"}] * 3
    _, out, _ = invoke(*options, "--json")
    assert json.loads(out)["text"] + "\n" == streamed


def test_speculative_text_is_the_dense_one(tiny: tuple[str, ...], invoke: Invoke) -> None:
    options = (*tiny, "--prompt", "one two one two", "--max-new-tokens", "30", "--ignore-eos")
    _, dense, _ = invoke(*options)
    for how in (("--speculate", "4"), ("--speculate-lookup",)):
        code, out, err = invoke(*options, *how)
        assert code == 0 and out == dense and "sparsity 0]" in err, err
        assert ("tokens drafted" in err) == ("4" in how), err  # this text says nothing twice
    _, out, _ = invoke(*options, "--speculate", "4", "--draft-sparsity", "0.3", "--json")
    found = json.loads(out)
    assert 0 < found["accepted_tokens"] <= found["drafted_tokens"] and found["text"] + "\n" == dense
    for wrong, message in (
        (("--sparsity", "0.5"), "--sparsity does not go with speculative decoding"),
        (("--stats",), "--stats does not go with"),
        (("--draft-plan", "/no/plan.json"), "/no/plan.json"),
    ):
        code, out, err = invoke(*options, "--speculate", "4", *wrong)
        assert code == 1 and message in err and "Traceback" not in err and out == "", err
    code, _, err = invoke(*options, "--speculate", "99")
    assert code == 1 and "--speculate 99 is out of range; expected 1 to 16" in err


def test_stats_prints_sparsity_by_layer_and_projection(tiny: tuple[str, ...], invoke: Invoke) -> None:
    options = ("--prompt", "The", "--max-new-tokens", "20", "--ignore-eos", "--sparsity", "0.5", "--stats")
    code, _, err = invoke(*tiny, *options)
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("layer")]
    assert len(lines) == 3 and all(f" {name} " in lines[0] for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert "GB/s measured" in err


def test_sampling_options_reach_the_sampler(tiny: tuple[str, ...], invoke: Invoke) -> None:
    options = (*tiny, "--prompt", "A", "--max-new-tokens", "12", "--ignore-eos")
    sampled = (*options, "--temperature", "2", "--seed", "5")
    assert invoke(*sampled)[1] == invoke(*sampled)[1]
    assert invoke(*sampled)[1] != invoke(*options, "--temperature", "2", "--seed", "6")[1]
    greedy = invoke(*options)[1]
    for nearly_greedy in (("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "0.999999")):
        assert invoke(*sampled, *nearly_greedy)[1] == greedy
    assert invoke(*options, "--repetition-penalty", "100")[1] != greedy
    bias = ("--logit-bias", "65:100")  # leaves no other token
    only = invoke(*options, *bias)[1]
    assert only != greedy and len(set(only.strip())) == 1
    for penalty in ("--presence-penalty", "--frequency-penalty"):
        assert invoke(*options, *bias, penalty, "2")[1] == only  # far less than the bias
        assert invoke(*options, penalty, "2")[1] != invoke(*options, penalty, "-2")[1]
    stop = greedy[3:5]
    assert invoke(*options, "--stop", stop)[1] == greedy[: greedy.index(stop)] + "\n"


def test_chat_keeps_the_conversation_and_its_cache(tiny: tuple[str, ...], invoke: Invoke) -> None:
    options = (*tiny, "--chat", "--system", "Be brief.", "--max-new-tokens", "6", "--ignore-eos", "--stats")
    code, _, err = invoke(*options, stdin="Hello there, how are you?\n\nAnd then?\n")
    assert code == 0, err
    cached = [line for line in err.splitlines() if "cached)" in line]
    assert len(cached) == 2  # the empty line is no message
    assert "(0 cached)" in cached[0]
    prompt, reused = (int(cached[1].split(f"{word}")[0].split()[-1].strip("(")) for word in (" tokens", " cached"))
    assert reused > 20 and prompt > reused


def test_no_compile_and_compile_agree(tiny: tuple[str, ...], invoke: Invoke) -> None:
    options = (*tiny, "--prompt", "The", "--max-new-tokens", "10", "--ignore-eos", "--sparsity", "0.5")
    assert invoke(*options, "--no-compile")[1] == invoke(*options, "--compile")[1]


def test_help_names_every_option_and_default(invoke: Invoke) -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    for action in generate.build_parser()._actions:
        assert action.help, action.dest
        assert action.option_strings[-1] in out


MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "missing-folder": (("--checkpoint", "/no/such/folder"), ("/no/such/folder", "hub id")),
    "not-a-model-file": (("--checkpoint", "README.md"), ("README.md", "not GGUF")),
    "sparsity-negative": (("--sparsity", "-0.1"), ("-0.1", "0 <= sparsity < 1")),
    "sparsity-one": (("--sparsity", "1"), ("'1'", "0 <= sparsity < 1")),
    "sparsity-nan": (("--sparsity", "nan"), ("nan", "0 <= sparsity < 1")),
    "sparsity-word": (("--sparsity", "half"), ("half",)),
    "no-such-plan": (("--plan", "/no/plan.json"), ("/no/plan.json",)),
    "plan-and-sparsity": (("--plan", "a", "--sparsity", "0.5"), ("not allowed with",)),
    "count-zero": (("--max-new-tokens", "0"), ("'0'", "at least 1")),
    "count-negative": (("--max-new-tokens", "-3"), ("-3", "at least 1")),
    "count-word": (("--max-new-tokens", "many"), ("many",)),
    "temperature-negative": (("--temperature", "-1"), ("--temperature -1.0", ">= 0")),
    "temperature-nan": (("--temperature", "nan"), ("--temperature nan",)),
    "top-k-negative": (("--top-k", "-2"), ("--top-k -2",)),
    "top-p-negative": (("--top-p", "-0.1"), ("--top-p -0.1",)),
    "min-p-one": (("--min-p", "1"), ("--min-p 1.0",)),
    "penalty-zero": (("--repetition-penalty", "0"), ("--repetition-penalty 0.0",)),
    "seed-negative": (("--seed", "-1"), ("--seed -1",)),
    "unknown-device": (("--device", "tpu"), ("--device tpu", "cpu, cuda")),
    "device-nonsense": (("--device", "cuda:x"), ("--device cuda:x",)),
    "unknown-dtype": (("--dtype", "int3"), ("int3", "bf16")),
    "unknown-option": (("--sparsness", "0.5"), ("--sparsness",)),
    "unknown-architecture": (("--random-weights", "GPT-5"), ("GPT-5", "Llama-3-8B")),
    "json-and-chat": (("--json", "--chat"), ("--json", "--chat")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_gets_one_line(name: str, tiny: tuple[str, ...], invoke: Invoke) -> None:
    arguments, fragments = MISTAKES[name]
    named = {"--checkpoint", "--random-weights"} & set(arguments)
    prompt = () if "--chat" in arguments else ("--prompt", "a")
    given = [a for a in tiny if a not in ("--dtype", "fp32")] if "--dtype" in arguments else list(tiny)
    code, out, err = invoke(*(() if named else given), *arguments, *prompt)
    assert out == ""
    assert_one_line_error(code, err, *fragments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(tiny: tuple[str, ...], invoke: Invoke) -> None:
    code, _, err = invoke("--checkpoint", tiny[1], "--device", "cuda", "--prompt", "a")
    assert_one_line_error(code, err, "--device cuda", "0 CUDA devices", "--device cpu")


def test_empty_prompt(tiny: tuple[str, ...], invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke(*tiny, "--prompt", "")
    assert_one_line_error(code, err, "--prompt is empty")
    (tmp_path / "empty").write_text("")
    code, _, err = invoke(*tiny, "--prompt-file", tmp_path / "empty")
    assert_one_line_error(code, err, "empty is empty")
    code, _, err = invoke(*tiny, "--prompt-file", tmp_path / "missing")
    assert_one_line_error(code, err, "missing", "No such file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    code, _, err = invoke(*tiny, "--prompt-file", tmp_path / "binary")
    assert_one_line_error(code, err, "binary", "not UTF-8")
    done = run_command(*tiny, stdin="")
    assert_one_line_error(done.returncode, done.stderr.decode(), "stdin is empty")


def test_prompt_longer_than_the_context(tiny: tuple[str, ...], invoke: Invoke) -> None:
    code, out, err = invoke(*tiny, "--prompt", "lobster " * 400)
    assert out == ""
    assert_one_line_error(code, err, "the prompt has", "context of 400")


def test_chat_without_a_template(tmp_path: Path, tiny_folder: Path) -> None:
    link_files(tiny_folder, tmp_path, without="*.jinja")
    done = run_command("--checkpoint", tmp_path, "--chat", stdin="hi\n")
    assert_one_line_error(done.returncode, done.stderr.decode(), "no chat template", "--prompt")


def test_plan_of_another_model(tiny: tuple[str, ...], invoke: Invoke, tmp_path: Path) -> None:
    layer = {n: {"sparsity": 0.5, "threshold": 0.1} for n in ("q", "k", "v", "o", "gate", "up", "down")}
    plan = {"format": "teal-plan", "version": 2, "method": "m", "target": 0.5, "calibration": {}}
    plan |= {"criterion": "magnitude", "model": {"hidden_size": 7}}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"layers": [layer]}))
    code, _, err = invoke(*tiny, "--plan", tmp_path / "plan.json", "--prompt", "a")
    assert_one_line_error(code, err, "plan.json", "hidden_size 7", "calibrate for this model")


def limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))


def test_out_of_memory(tmp_path: Path) -> None:
    command = [sys.executable, "generate.py", "--random-weights", "Llama-3-8B", "--device", "cpu", "--dtype", "bf16"]
    done = subprocess.run(
        [*command, "--prompt", "a"], capture_output=True, text=True, cwd=ROOT, preexec_fn=limit_memory, timeout=120
    )
    assert done.stdout == ""
    assert_one_line_error(done.returncode, done.stderr, "out of memory", "smaller model")


def test_cuda_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, invoke: Invoke) -> None:
    def load(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore\nlines")

    monkeypatch.setattr(engine.Engine, "load", load)
    code, _, err = invoke("--prompt", "a")
    assert_one_line_error(code, err, "out of memory", "Tried to allocate 1 GiB")


def start_long_stream(tiny: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A process that has begun to print a text it would go on printing for long."""
    options = ("--random-weights", "SmolLM2-135M", "--device", "cpu", "--dtype", "bf16", "--no-compile")
    command = [sys.executable, "generate.py", *options, "--prompt", "a", "--max-new-tokens", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.read(1)
    return process


def test_interrupt_in_the_middle_of_a_stream(tiny: tuple[str, ...]) -> None:
    process = start_long_stream(tiny)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.decode().strip().splitlines()[-1] == "interrupted" and b"Traceback" not in err


def test_closed_stdout(tiny: tuple[str, ...]) -> None:
    process = start_long_stream(tiny)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    err = process.stderr.read().decode()
    process.stderr.close()
    assert err.strip().splitlines()[-1].startswith("error: stdout was closed") and "Traceback" not in err
    assert "Exception ignored" not in err


def test_interrupted_calibration_leaves_no_plan(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(own_cache(tmp_path))}
    options = ("--random-weights", "SmolLM2-135M", "--device", "cpu", "--sparsity", "0.5", "--prompt", "a")
    process = subprocess.Popen(
        [sys.executable, "generate.py", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "teal" / "plans").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out == b"" and b"Traceback" not in err
    assert list((tmp_path / "teal" / "plans").iterdir()) == []


def test_bugs_keep_their_traceback() -> None:
    def main() -> None:
        raise AssertionError("a bug")

    with pytest.raises(AssertionError, match="a bug"):
        cli.run(main)


def unreadable_weights(tiny_folder: Path, folder: Path) -> Path:
    """A checkpoint all of which can be read but its weights: whoever gets that far says so."""
    link_files(tiny_folder, folder, without="*.safetensors")
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


NO_PLAN = {"format": "teal-plan", "version": 2, "method": "m", "target": 0.5, "calibration": {}, "layers": []}
EARLY: dict[str, tuple[tuple[str, ...], str]] = {
    "prompt-too-long": (("--prompt", "lobster " * 400), "the prompt has"),
    "no-such-prompt-file": (("--prompt-file", "/no/file"), "/no/file"),
    "no-such-prompt-file-in-chat": (("--chat", "--prompt-file", "/no/file"), "/no/file"),
    "no-such-plan": (("--prompt", "a", "--plan", "/no/plan.json"), "/no/plan.json"),
    "plan-of-another-shape": (("--prompt", "a", "--plan", "PLAN"), "plan is for another model"),
    "broken-plan": (("--prompt", "a", "--plan", "BROKEN"), "broken.json"),
    "no-such-draft-plan": (("--prompt", "a", "--speculate", "2", "--draft-plan", "/no/plan.json"), "/no/plan.json"),
    "draft-too-long": (("--prompt", "a", "--speculate", "99"), "--speculate 99"),
    "lookup-too-long": (("--prompt", "a", "--speculate", "99", "--speculate-lookup"), "--speculate 99"),
    "dense-draft": (("--prompt", "a", "--speculate", "2", "--draft-sparsity", "0"), "--draft-sparsity 0"),
    "head-without-quant": (("--prompt", "a", "--lm-head", "int8"), "--lm-head goes with --quant"),
    "width-without-groups": (("--prompt", "a", "--quant", "int4"), "group"),
    "draft-width-without-groups": (("--prompt", "a", "--speculate", "2", "--draft-quant", "int4"), "group"),
    "empty-stop": (("--prompt", "a", "--stop", ""), "--stop is empty"),
    "system-without-chat": (("--prompt", "a", "--system", "x"), "--system goes with --chat"),
    "chat-without-template": (("--chat", "--prompt", "a", "--checkpoint", "PLAIN"), "no chat template"),
}


@pytest.mark.parametrize("name", EARLY)
def test_refused_before_the_weights_are_read(name: str, tiny_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    arguments, fragment = EARLY[name]
    (tmp_path / "model").mkdir()
    folder = unreadable_weights(tiny_folder, tmp_path / "model")
    (tmp_path / "plain").mkdir()
    plain = unreadable_weights(tiny_folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    layer = {n: {"sparsity": 0.5, "threshold": 0.1} for n in ("q", "k", "v", "o", "gate", "up", "down")}
    plan = NO_PLAN | {"criterion": "magnitude", "model": {"hidden_size": 7}, "layers": [layer]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "broken.json").write_text("{")
    files = {"PLAN": "plan.json", "BROKEN": "broken.json"}
    given = [str(tmp_path / files[a]) if a in files else str(plain) if a == "PLAIN" else a for a in arguments]
    code, out, err = invoke("--checkpoint", folder, "--device", "cpu", "--dtype", "fp32", *given)
    assert out == ""
    assert_one_line_error(code, err, fragment)
    if "--checkpoint" not in arguments:
        code, _, err = invoke("--checkpoint", folder, "--device", "cpu", "--dtype", "fp32", "--prompt", "a")
        assert_one_line_error(code, err, "model.safetensors")


def test_the_plan_beside_the_checkpoint_is_checked_first(tiny_folder: Path, tmp_path: Path, invoke: Invoke) -> None:
    folder = unreadable_weights(tiny_folder, tmp_path)
    (folder / "teal-0.5.json").write_text("[]")
    code, _, err = invoke("--checkpoint", folder, "--device", "cpu", "--sparsity", "0.5", "--prompt", "a")
    assert_one_line_error(code, err, "teal-0.5.json")


def test_an_unknown_gguf_architecture_is_refused_by_the_header(tmp_path: Path, invoke: Invoke) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(1000)])
    writer.add_tensor("token_embd.weight", np.zeros((1000, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:200])  # all that is read
    for name in ("model.gguf", "cut.gguf"):
        code, out, err = invoke("--checkpoint", tmp_path / name, "--prompt", "a")
        assert out == ""
        assert_one_line_error(code, err, name, "GGUF architecture 'mamba' is not supported", "llama")


def test_streams_that_are_closed_or_know_few_characters(tiny: tuple[str, ...]) -> None:
    command = f"{sys.executable} generate.py {' '.join(tiny)} --max-new-tokens 8 --ignore-eos"
    for rest, expected in (("--prompt Größe --temperature 2 >&-", 0), ("2>&- <&-", 1), ("--chat <&-", 0)):
        done = subprocess.run(
            f"{command} {rest}",
            shell=True,
            cwd=ROOT,
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == expected and b"Traceback" not in done.stderr, done.stderr
        assert b"error" not in done.stdout


def test_a_message_that_is_not_utf8_is_refused_and_the_conversation_goes_on(tiny: tuple[str, ...]) -> None:
    done = run_command(*tiny, "--chat", "--max-new-tokens", "4", "--ignore-eos", stdin=b"caf\xe9\nhello\n")
    err = done.stderr.decode()
    assert done.returncode == 0 and "is not UTF-8 text" in err and "Traceback" not in err, err
    assert done.stdout.strip()
