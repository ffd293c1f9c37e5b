"""A model that several ranks share: the logits and texts of one, and an end of all when one is lost."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.checkpoint.sharding import cut_tensor, part_config
from teal.checkpoint.weights import empty_model, load_model, stored_config, weight_targets
from teal.cli.quantize import quantize_folder
from teal.cli.ranks import Started, Watch
from teal.decoding.backends import best_backend
from teal.decoding.ranks import on_all_ranks, uninterrupted
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig
from teal.layers.team import join_team
from teal.model import ModelConfig
from teal.options import RANK, RANKS
from teal.parallel import Rank
from teal.plan import ProjectionPlan, even_plan
from tests.checkpoint.test_awq_gptq import AWQ, GPTQ
from tests.checkpoint.test_awq_gptq import write as write_packed
from tests.checkpoint.test_families import FAMILIES
from tests.conftest import assert_near, logits_of_ranks, run_command, save_tiny_model, tiny_config
from tests.decoding.test_family_texts import ONE_OF_EACH
from tests.ranks import logits_of
from tests.server_process import serving

CPU = torch.device("cpu")
SHAREABLE = [name for kind, name in ONE_OF_EACH.items() if kind != "olmo2"]
# Widths whose halves are whole groups; one key and value head, which both of two ranks then have.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
QUANTIZED = {
    "int8": QuantConfig("int8", 32, lm_head=True),
    "int4": QuantConfig("int4", 32, embedding=True, lm_head=True),
    "int4-input": QuantConfig("int4", 32, grouping="input"),
}
CACHE = "int8 cache"
# Sums in another order move single keys and values to the next of their 255 steps.
LIMITS = {CACHE: 3e-4}
CONFIG = ModelConfig(320, 64, 96, 2, 8, 2, 8, 128)


def families(folder: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """A model of every family; 301 tokens, which two ranks do not share evenly."""
    for name in SHAREABLE:
        kind, options = FAMILIES[name]
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 48, "head_dim": 12}
        own = options | (heads if options.get("num_attention_heads") == 9 else {}) | {"vocab_size": 301}
        save_tiny_model(tiny_config(kind, **own), folder / name)
        yield name, {"checkpoint": str(folder / name)}


def formats(folder: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Quantized weights of every kind, and a plan."""
    source = folder / "floats"
    save_tiny_model(tiny_config("qwen2", **WIDE, vocab_size=320, tie_word_embeddings=True), source)
    even_plan(stored_config(source), ProjectionPlan(0.3, 0.2)).save(folder / "plan.json")
    yield "sparse", {"checkpoint": str(source), "plan": str(folder / "plan.json")}
    yield "rounded at load", {"checkpoint": str(source), "quant": "int4", "quant_lm_head": "int8"}
    yield CACHE, {"checkpoint": str(source), "kv_cache": "int8"}
    yield "a backend's steps", {"checkpoint": str(source), "backend": "eager"}
    for name, config in QUANTIZED.items():
        quantize_folder(source, folder / name, config, "rtn", torch.zeros(0))
        yield f"{name} sparse", {"checkpoint": str(folder / name), "plan": str(folder / "plan.json")}
    for name, packing in (("awq", AWQ), ("gptq of whole channels", GPTQ | {"group_size": -1})):
        packed, _ = write_packed(folder / name, packing, **WIDE, vocab_size=301)
        yield name, {"checkpoint": str(packed)}


def test_logits_are_those_of_one(tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    cases = dict([*families(tmp_path), *formats(tmp_path)])
    for options in cases.values():
        (Path(str(options["checkpoint"])) / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    first, second = logits_of_ranks(cases, 2, tmp_path)
    assert first.keys() == cases.keys()
    for name, options in cases.items():
        assert torch.equal(first[name], second[name]), name
        assert_near(name, first[name], logits_of(options), LIMITS.get(name, 1e-5))


def parts_of(tensor: Tensor, name: str, parts: list[dict[str, Tensor]]) -> list[Tensor]:
    """What each rank holds of the tensor of this name, whose shape its own model says."""
    module = name.rpartition(".")[0].removeprefix("model.layers.0.")
    cuts = [Rank(i, len(parts)).cuts(CONFIG)[module] for i in range(len(parts))]
    return [cut_tensor(tensor, cut, name, part[name]) for cut, part in zip(cuts, parts, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_parts_make_the_whole(ranks: int) -> None:
    """Put together again, but for key and value heads that are fewer than ranks: those stand on several."""
    whole = weight_targets(empty_model(CONFIG, CPU, torch.float32))
    parts = [weight_targets(empty_model(part_config(CONFIG, Rank(i, ranks)), CPU, torch.float32)) for i in range(ranks)]
    for name in whole:
        if "norm" in name or "layers.1" in name:
            continue
        tensor = torch.randn(whole[name].shape)
        found = parts_of(tensor, name, parts)
        assert all(part[name].shape == own.shape for part, own in zip(parts, found, strict=True))
        dim = 1 if "o_proj" in name or "down_proj" in name else 0
        if "k_proj" in name or "v_proj" in name:
            found = found[:: max(1, ranks // CONFIG.num_kv_heads)]
        assert torch.equal(torch.cat(found, dim), tensor), name


def test_query_heads_have_their_key_head() -> None:
    """Of eight query heads four share a key head: ranks 0 to 3 of eight have the first, the others the second."""
    found = [Rank(i, 8).cuts(CONFIG)["self_attn.k_proj"].start for i in range(8)]
    assert found == [0] * 4 + [8] * 4
    assert Rank(5, 8).config(CONFIG).num_kv_heads == 1


def test_rows_beyond_the_vocabulary_are_zeros() -> None:
    config = ModelConfig(7, 8, 16, 1, 2, 2, 4, 32)
    cut = Rank(1, 2).cuts(config)["lm_head"]
    rows = cut_tensor(torch.ones(7, 8), cut, "lm_head.weight", torch.empty(4, 8))
    assert torch.equal(rows, torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].expand(4, 8))


def test_a_bias_is_added_once() -> None:
    bias = torch.ones(64)
    cuts = [Rank(i, 2).cuts(CONFIG)["self_attn.o_proj"] for i in range(2)]
    first, second = (cut_tensor(bias, cut, "self_attn.o_proj.bias", bias) for cut in cuts)
    assert torch.equal(first + second, bias)


@pytest.mark.parametrize(
    "change,ranks,message",
    [
        ({"num_heads": 6}, 4, "tensor_parallel 4 does not divide this model's 6 attention heads"),
        ({"intermediate_size": 97}, 2, "does not divide this model's 97 hidden channels"),
        ({"num_heads": 12, "num_kv_heads": 3}, 2, "3 key and value heads cannot be shared evenly"),
        ({"qk_norm": True, "qk_norm_full": True}, 2, "norms of q and k over all heads"),
    ],
)
def test_what_cannot_be_shared_is_named(change: dict[str, Any], ranks: int, message: str) -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match=message):
        Rank(0, ranks).config(replace(CONFIG, **change))


@pytest.mark.parametrize(
    "config,message",
    [
        (QuantConfig("int8", 32), "group_size 32 does not fit the gate and up width 48"),
        (QuantConfig("mixed", 32, average_bits=4.5, refined=((4, 4, 4, 4),) * 3), "mixed bits"),
    ],
    ids=["groups", "mixed"],
)
def test_weights_that_cannot_be_cut_are_named(config: QuantConfig, message: str, tmp_path: Path) -> None:
    """48 hidden channels a rank are no whole groups of 32."""
    save_tiny_model(tiny_config("qwen2", **WIDE | {"intermediate_size": 96}, vocab_size=320), tmp_path / "a")
    quantize_folder(tmp_path / "a", tmp_path / "b", config, "rtn", torch.arange(5, 69)[None])
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "b", CPU, torch.float32, rank=Rank(0, 2))


def test_a_failure_of_the_first_rank_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The others wait in the same call, so that no later one would meet theirs."""

    class Runner:
        calls, address = SimpleNamespace(leads=True, tell=lambda *call: told.append(call)), (3, None)

        @on_all_ranks
        def step(self, length: int) -> None:
            raise RuntimeError(f"no memory for {length}\nmore of it")

    told: list[Any] = []
    with pytest.raises(SystemExit):
        Runner().step(7)
    assert told == [(3, None, "step", 7)]
    assert capsys.readouterr().err == (
        "error: rank 0 failed in step, where the others wait: RuntimeError: no memory for 7\n"
    )


def test_ctrl_c_waits_for_the_end_of_a_call() -> None:
    """The others are in the middle of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is begun with SIGINT ignored
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append(True)
    assert done


def test_several_gpus_take_the_fused_kernels() -> None:
    assert best_backend("cuda", False, False, None, is_shared=True)[0] == "fused"
    assert best_backend("cpu", False, False, None, is_shared=True)[0] == "eager"


def test_text_by_a_seed(tiny_folder: Path) -> None:
    """Drawn on the host after the prompt and by steps after that, on all ranks alike."""
    options: list[str | Path] = [
        "--checkpoint",
        tiny_folder,
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--prompt",
        "The lobster",
    ]
    options += ["--max-new-tokens", "24", "--temperature", "0.9", "--seed", "7", "--repetition-penalty", "1.3"]
    alone, shared = run_command(*options), run_command(*options, "--tensor-parallel", "2")
    assert (alone.returncode, shared.returncode) == (0, 0), shared.stderr
    assert alone.stdout == shared.stdout


@pytest.mark.parametrize(
    "options,message",
    [
        (("--tensor-parallel", "4"), "does not divide this model's 6 attention heads"),
        (("--tensor-parallel", "2", "--sparsity", "0.35"), "needs a plan, which one device makes"),
        (("--tensor-parallel", "9"), "on a CPU at most 8 processes share a model"),
        (("--tensor-parallel", "2", "--device", "cuda:1"), "leave --device cuda:1 out"),
    ],
)
def test_mistakes_are_one_line(options: tuple[str, ...], message: str, tiny_folder: Path) -> None:
    done = run_command("--checkpoint", tiny_folder, "--prompt", "a", *options)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1 and len(lines) == 1, lines
    assert lines[0].startswith("error: --tensor-parallel") and message in lines[0]


def test_a_library_user_is_told_how_to_start() -> None:
    from teal import Engine

    with pytest.raises(UserError, match="start it from a command line, or 2 of them by torchrun"):
        Engine.load(tensor_parallel=2, device="cpu")


def test_all_models_of_a_process_are_of_one_team(monkeypatch: pytest.MonkeyPatch) -> None:
    """As evaluate.py's reference and a draft are, whatever their architectures."""
    for name, value in ((RANKS, "2"), (RANK, "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    sizes: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "num_layers": 1, "max_seq_len": 8}
    small, large = (ModelConfig(vocab_size=9, hidden_size=n, intermediate_size=2 * n, **sizes) for n in (32, 64))
    teams = [join_team(2, CPU, config) for config in (small, large, None)]
    assert teams[0] is teams[1] is teams[2]


def children(process: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def assert_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        assert time.monotonic() < deadline, f"{processes} did not end"
        time.sleep(0.05)


TWO = ("--device", "cpu", "--tensor-parallel", "2", "--rows", "2")


def test_clients_share_a_shared_model(tiny_folder: Path) -> None:
    """Texts beside each other are those alone, from a few clients or from many; at SIGTERM no process stays."""
    prompts = ["The lobster", "def f(x):", "Größe"]
    ask = {"model": tiny_folder.name, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with serving(tiny_folder, *TWO) as server:
        others = children(server.process.pid)
        assert len(others) == 1
        alone = [server.client.completions.create(prompt=prompt, **ask).choices[0].text for prompt in prompts]
        together = server.client.completions.create(prompt=prompts, **ask).choices
        assert [choice.text for choice in together] == alone
        load = ["--requests", "100", "--clients", "8", "--prompts", "10", "--max-tokens", "12", "--words", "30"]
        done = run_command("-m", "bench.load", "--url", f"http://127.0.0.1:{server.port}", *load)
        assert done.returncode == 0 and b'"lost": 0, "different": 0' in done.stdout, done.stdout + done.stderr
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        assert_gone(others)


@pytest.mark.parametrize(
    "signal_sent,message",
    [
        (signal.SIGKILL, "error: rank 1 ended with code -9"),
        pytest.param(signal.SIGSTOP, "error: rank 1 has been silent for 8 s, it hangs", marks=pytest.mark.slow),
    ],
    ids=["dead", "hung"],
)
def test_a_lost_rank_ends_all(signal_sent: signal.Signals, message: str, tiny_folder: Path) -> None:
    with serving(tiny_folder, *TWO) as server:
        others = children(server.process.pid)
        os.kill(others[0], signal_sent)
        assert server.process.wait(12) == 1
        assert server.log.read_text().splitlines()[-1].startswith(message)
        assert_gone(others)


def test_an_end_before_the_watch_begins(capsys: pytest.CaptureFixture[str]) -> None:
    """As of a command that fails at once: the thread then finds its sockets closed."""
    ours, theirs = socket.socketpair()
    watch = Watch([Started(1, subprocess.Popen(["true"], text=True), ours)])
    watch.end()
    watch.run()
    theirs.close()
    assert capsys.readouterr().err == ""


def test_ranks_end_with_the_first(tiny_folder: Path) -> None:
    """Even where it had no time to say so."""
    with serving(tiny_folder, *TWO) as server:
        others = children(server.process.pid)
        server.process.kill()
        assert_gone(others)
