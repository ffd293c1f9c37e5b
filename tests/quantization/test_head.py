"""A head in 4 bits: its rounding by each method, folders, rounding at load, who decodes it, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.weights import find_shards, load_model
from teal.cli import evaluate, generate, quantize
from teal.decoding.engine import Engine
from teal.decoding.speculation import SpeculativeEngine
from teal.errors import UserError
from teal.kernels.formats.packing import dequantize
from teal.kernels.reduce_partials import reduce_partials
from teal.kernels.sparse_gemv import sparse_gemv
from teal.layers.quantized_linear import QuantConfig, QuantizedHead, round_to_nearest
from teal.model import Transformer
from teal.options import DraftOptions, ModelOptions
from teal.quantization.gptq import BlockwiseGptq, gptq
from teal.quantization.half_quadratic import half_quadratic
from teal.teal_layers import weight_bytes_per_token
from tests.conftest import (
    QUANTIZABLE,
    ROOT,
    assert_near,
    assert_one_line_error,
    relative_error,
    save_tiny_model,
    tiny_config,
)
from tests.quantized_folders import TEXT_OPTIONS, dequantized_twin
from tests.token_logits import SEQUENCES, logits

Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
HIDDEN, VOCABULARY = 64, 320
INT4 = QuantConfig("int4", 32, lm_head=True, head_bits=4)
INT8 = QuantConfig("int8", 32, lm_head=True, head_bits=4)
PROMPT = [5, 9, 33, 120, 7]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer_json: str) -> Path:
    """A checkpoint whose head is a weight of its own."""
    folder = tmp_path_factory.mktemp("untied") / "source"
    config = tiny_config("llama", **QUANTIZABLE, vocab_size=VOCABULARY, max_position_embeddings=400)
    save_tiny_model(config, folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def by_gptq(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "out"
    quantize.quantize_folder(untied, out, INT4, "gptq", SEQUENCES, "cpu")
    return out


def load(folder: Path) -> Transformer:
    return load_model(folder, CPU, torch.float32)


def original_head(source: Path) -> Tensor:
    """The head's weight [K, N] before it is rounded."""
    return load(source).lm_head.weight.t().contiguous()


@torch.inference_mode()
def head_inputs(model: Transformer) -> Tensor:
    """What the head reads of the calibration text [S * L, K]."""
    S, L = SEQUENCES.shape
    hidden = model.hidden_states(SEQUENCES, torch.arange(L).expand(S, L), model.new_cache(S, L))
    return model.norm(hidden).flatten(0, 1)


@pytest.mark.parametrize("scheme", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("kind,method", [("tied", "rtn"), ("untied", "rtn"), ("untied", "hqq"), ("tied", "gptq")])
def test_a_folder_holds_4_bits_and_computes_with_them(
    kind: str, method: str, scheme: QuantConfig, untied: Path, quantizable_folder: Path, tmp_path: Path
) -> None:
    source, out = untied if kind == "untied" else quantizable_folder, tmp_path / "out"
    quantize.quantize_folder(source, out, scheme, method, SEQUENCES if method == "gptq" else None, "cpu")
    stored = {name: tensor for shard in find_shards(out) for name, tensor in load_file(shard).items()}
    parts = {name: (tuple(t.shape), t.dtype) for name, t in stored.items() if name.startswith("lm_head")}
    assert parts == {
        "lm_head.qweight": ((HIDDEN, VOCABULARY // 8), torch.int32),
        "lm_head.scales": ((HIDDEN, VOCABULARY // 32), torch.float32),
        "lm_head.zeros": ((HIDDEN, VOCABULARY // 32), torch.uint8),
    }
    model = load(out)
    assert isinstance(model.lm_head, QuantizedHead) and model.lm_head.bits == 4
    if method != "gptq":
        rounding = {"rtn": round_to_nearest, "hqq": half_quadratic}[method]
        expected = dequantize(*rounding(original_head(source), 4, 32))
        assert torch.equal(model.lm_head.dequantized(), expected)
    assert_near("logits of the dequantized twin", logits(model), logits(dequantized_twin(source, model)), 1e-5)
    assert_near("logits of the dense model", logits(model), logits(load(source)), 0.5)


def divergence(logits: Tensor, reference: Tensor) -> float:
    """KL of logits from reference, both [T, N], in nats a token."""
    p, q = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_gptq_loses_less_than_rounding_to_nearest(untied: Path, by_gptq: Path) -> None:
    model, weight = load(by_gptq), original_head(untied)
    assert isinstance(model.lm_head, QuantizedHead)
    x = head_inputs(model)
    exact, found, nearest = (
        x @ w for w in (weight, model.lm_head.dequantized(), dequantize(*round_to_nearest(weight, 4, 32)))
    )
    assert relative_error(found, exact) < 0.85 * relative_error(nearest, exact), "logits"
    assert divergence(found, exact) < 0.75 * divergence(nearest, exact)


def test_gptq_rounds_the_head_for_its_own_inputs(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Those that the rounded blocks and the final norm give it."""
    calls: list[tuple[tuple[Any, ...], Any]] = []

    def noting(*arguments: Any) -> Any:
        calls.append((arguments, gptq(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr("teal.quantization.gptq.gptq", noting)
    quantize.quantize_folder(untied, tmp_path / "out", INT4, "gptq", SEQUENCES, "cpu")
    model = load(tmp_path / "out")
    (weight, hessian, *_), packed = calls[-1]
    assert torch.equal(weight, original_head(untied))
    x = head_inputs(model)
    assert_near("the sum of x^T x", hessian, x.t() @ x, 1e-5)
    assert isinstance(model.lm_head, QuantizedHead) and torch.equal(model.lm_head.dequantized(), dequantize(*packed))


def test_an_interrupted_run_goes_on(
    untied: Path, by_gptq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """From the head, whose inputs come from the blocks that were written before."""

    def failing(self: BlockwiseGptq, weight: Tensor, refined: Tensor | None) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BlockwiseGptq, "head", failing)
        quantize.quantize_folder(untied, out, INT4, "gptq", SEQUENCES, "cpu")
    monkeypatch.setattr(BlockwiseGptq, "layer", failing)
    quantize.quantize_folder(untied, out, INT4, "gptq", SEQUENCES, "cpu")
    for one, other in zip(find_shards(out), find_shards(by_gptq), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_mixed_head_is_rounded_by_the_method_too(method: str, untied: Path, tmp_path: Path) -> None:
    scheme = QuantConfig("mixed", 32, lm_head=True, average_bits=5.0, head_bits=4)
    quantize.quantize_folder(untied, tmp_path / "out", scheme, method, SEQUENCES, "cpu")
    model, weight = load(tmp_path / "out"), original_head(untied)
    head = model.lm_head
    assert isinstance(head, QuantizedHead) and head.refined is not None
    x = head_inputs(model)
    error = relative_error(x @ head.dequantized(), x @ weight)
    nearest = relative_error(x @ dequantize(*round_to_nearest(weight, 4, 32)), x @ weight)
    assert (0.7 if method == "rtn" else 0.0) * nearest < error < (1.0 if method == "rtn" else 0.7) * nearest


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_at_load_as_in_a_folder(mode: str, quantizable_folder: Path, tmp_path: Path, call_main: Command) -> None:
    out, command = tmp_path / "out", ("--mode", mode, "--lm-head", "int4")
    code, _, err = call_main(quantize.main, "--checkpoint", quantizable_folder, *command, "-o", out)
    assert code == 0, err
    code, written, err = call_main(generate.main, "--checkpoint", out, *TEXT_OPTIONS)
    assert code == 0 and written.strip(), err
    at_load = ("--checkpoint", quantizable_folder, "--quant", mode, "--lm-head", "int4")
    assert call_main(generate.main, *at_load, *TEXT_OPTIONS)[1] == written
    given = ModelOptions(
        str(quantizable_folder), device="cpu", dtype="fp32", quant=mode, quant_lm_head="int4"
    )  # fmt: skip
    loaded = load_for_decoding(given)
    assert loaded.identity.endswith(f"-{mode}-head4")
    assert torch.equal(logits(loaded.model), logits(load(out)))


@pytest.mark.parametrize("scheme,bits", [(INT4, 4), (INT8, 8)], ids=["int4", "int8"])
def test_bytes_per_token(scheme: QuantConfig, bits: int, untied: Path, tmp_path: Path, call_main: Command) -> None:
    quantize.quantize_folder(untied, out := tmp_path / "out", scheme)
    model = load(out)
    weights = sum(p.in_features * sum(p.sizes) for p in model.config.projections()) * model.config.num_layers
    zeros = {4: 1, 8: 0}  # bytes of a group's
    expected = weights * bits / 8 + weights / 32 * (2 + zeros[bits])
    expected += HIDDEN * VOCABULARY / 2 + HIDDEN * VOCABULARY / 32 * (2 + zeros[4])
    assert weight_bytes_per_token(model, 2) == expected
    text = ("--text", ROOT / "README.md", "--tokens", "64", "--window", "32", "--stride", "16", "--sparsity", "0")
    measured = ("--checkpoint", out, "--reference", untied, "--device", "cpu", "--dtype", "fp32", *text, "--json")
    code, table, err = call_main(evaluate.main, *measured)
    assert code == 0 and f'"bytes_per_token": {expected:.0f}' in table, err + table


@pytest.mark.parametrize("backend", ["program", "compiled"])
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_backends_of_a_cpu_give_the_same_text(backend: str, sparsity: float, by_gptq: Path) -> None:
    engines = [
        Engine.load(str(by_gptq), device="cpu", dtype="fp32", backend=name, sparsity=sparsity)
        for name in (backend, "eager")
    ]
    assert engines[0].backend.name == backend
    texts = [list(e.generate(PROMPT, max_new_tokens=20, ignore_eos=True)) for e in engines]
    assert texts[0] == texts[1] and len(texts[0]) == 20


def test_it_drafts_for_the_model_that_it_was_made_of(untied: Path, by_gptq: Path) -> None:
    given = ModelOptions(str(untied), device="cpu", dtype="fp32")
    engine = SpeculativeEngine.load_with_draft(given, DraftOptions(length=3, sparsity=0.0, checkpoint=str(by_gptq)))
    text = list(engine.generate(PROMPT, max_new_tokens=30, ignore_eos=True))
    assert text == list(Engine.load(given).generate(PROMPT, max_new_tokens=30, ignore_eos=True))
    assert engine.stats.accepted_tokens > 0


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"])
def test_the_triton_kernels(dtype: torch.dtype, limit: float) -> None:
    """Run by the interpreter on a CPU: partial sums added up to fp32 logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, HIDDEN, generator=generator).to(dtype)
    packed = round_to_nearest(torch.randn(HIDDEN, VOCABULARY, generator=generator).to(dtype), 4, 32)
    partials = sparse_gemv(x, packed[0], torch.zeros(1), [VOCABULARY], *packed[1:])
    found = reduce_partials(partials, torch.float32, None, None)
    assert found.dtype == torch.float32
    assert_near("logits", found, x.float() @ dequantize(packed[0], packed[1].float(), packed[2]), limit)


def test_readers_of_older_versions_meet_one_that_they_refuse() -> None:
    assert INT4.as_json() == {
        "quant_method": "teal", "version": 4, "mode": "int4", "group_size": 32, "lm_head": True, "grouping": "output",
        "head_bits": 4,
    }  # fmt: skip
    assert QuantConfig("int8", 32, lm_head=True, embedding=True, head_bits=4).as_json()["version"] == 4
    assert "head_bits" not in QuantConfig("int4", 32, lm_head=True).as_json()
    assert QuantConfig.from_json(INT4.as_json(), "here") == INT4


DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 1}, "mode int4 has version 1; expected 4"),
    "bits": ({"head_bits": 3}, "head_bits 3 is not usable; expected 4 or 8"),
    "head of 8": ({"head_bits": 8, "version": 1}, "lm_head.qweight has dtype I32; expected one of I8"),
    "no head": ({"lm_head": False}, "head_bits is 4; expected 8 for a head that is not rounded"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_config_is_one_line(name: str, by_gptq: Path, tmp_path: Path) -> None:
    change, fragment = DAMAGES[name]
    broken = shutil.copytree(by_gptq, tmp_path / "broken")
    raw = json.loads((broken / "config.json").read_text())
    raw["quantization_config"] |= change
    (broken / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load(broken)
    assert fragment in str(error.value) and str(broken) in str(error.value) and "\n" not in str(error.value)


def test_mode_mixed_has_a_head_of_its_own_bits(untied: Path, tmp_path: Path, call_main: Command) -> None:
    command = ("--mode", "mixed", "--lm-head", "int4", "-o", tmp_path / "out")
    code, _, err = call_main(quantize.main, "--checkpoint", untied, *command)
    assert_one_line_error(code, err, "--lm-head int4 does not go with --mode mixed; choose mixed or int8")
    assert not (tmp_path / "out").exists()
