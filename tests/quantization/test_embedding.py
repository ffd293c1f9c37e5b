"""An embedding in 8 bits: its rounding, folders of it with heads of their own and tied ones, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from teal import quantize as quantize_in_memory
from teal.checkpoint.weights import find_shards, load_model, stored_config
from teal.cli import evaluate, quantize
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.layers.quantized_embedding import QuantizedEmbedding
from teal.layers.quantized_linear import QuantConfig, QuantizedLinear
from teal.plan import keep_all_plan
from teal.teal_layers import sparsify
from tests.conftest import QUANTIZABLE, ROOT, assert_near, assert_one_line_error, save_tiny_model, tiny_config
from tests.token_logits import SEQUENCES, logits

Command = Callable[..., tuple[int, str, str]]
CPU = torch.device("cpu")
INT8, MIXED = QuantConfig("int8", 32, embedding=True), QuantConfig("mixed", 32, embedding=True, average_bits=5.0)
TIED = QuantConfig("int4", 32, lm_head=True, embedding=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer_json: str) -> Path:
    """A checkpoint whose head is a weight of its own."""
    folder = tmp_path_factory.mktemp("untied") / "source"
    save_tiny_model(tiny_config("llama", **QUANTIZABLE, vocab_size=320, max_position_embeddings=400), folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    return folder


def nearest(weight: Tensor, group: int = 32) -> Tensor:
    """weight [V, C] rounded to 8 bits with a scale for each group along a row, written out: fp32."""
    found = torch.full(weight.shape, torch.nan)
    for token, row in enumerate(weight.float()):
        for i in range(0, len(row), group):
            scale = (row[i : i + group].abs().max() / 127).to(weight.dtype).float()
            found[token, i : i + group] = (row[i : i + group] / scale).round() * scale
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    embedding = QuantizedEmbedding(nn.Embedding(7, 96, _weight=weight), 32)
    embedding.round(weight)
    tokens = torch.tensor([[0, 6, 3], [3, 3, 5]])
    found = embedding(tokens)
    assert found.dtype == torch.float32 and torch.equal(found, nearest(weight)[tokens])
    assert 1e-3 < float((found - weight[tokens].float()).norm() / weight[tokens].float().norm()) < 0.01
    assert embedding(tokens[0, 1]).shape == (96,)


@pytest.mark.parametrize("scheme", [INT8, MIXED, TIED], ids=lambda scheme: scheme.mode)
def test_a_folder_computes_what_its_embedding_says(
    scheme: QuantConfig, untied: Path, quantizable_folder: Path, tmp_path: Path
) -> None:
    source = quantizable_folder if scheme is TIED else untied
    quantize.quantize_folder(source, tmp_path / "out", scheme, "rtn", SEQUENCES, "cpu")
    plain = QuantConfig(**asdict(scheme) | {"embedding": False})
    quantize.quantize_folder(source, tmp_path / "plain", plain, "rtn", SEQUENCES, "cpu")
    model, twin = (load_model(tmp_path / name, CPU, torch.float32) for name in ("out", "plain"))
    floats = logits(twin)
    twin.embedding.weight = nn.Parameter(nearest(twin.embedding.weight), requires_grad=False)
    assert isinstance(model.embedding, QuantizedEmbedding)
    assert_near("logits", logits(model), logits(twin), 1e-6)
    assert not torch.equal(logits(model), floats)
    stored = {name for shard in find_shards(tmp_path / "out") for name in load_file(shard)}
    assert {name for name in stored if "embed" in name} == {"model.embed_tokens.qweight", "model.embed_tokens.scales"}
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["quantization_config"]["version"] == 3 and described["quantization_config"]["embedding"] is True
    assert isinstance(model.lm_head, QuantizedLinear) == scheme.lm_head
    V, C = model.config.vocab_size, model.config.hidden_size
    assert sum(p.nbytes for p in model.embedding.parameters()) == V * C + 4 * V * C // 32  # scales are fp32 here


def test_the_folder_of_others_is_as_before() -> None:
    assert "embedding" not in QuantConfig("int8", 32).as_json() and QuantConfig("int8", 32).as_json()["version"] == 1


# The program sums in another order: rounded to bf16, near ties of a random model part its text from the modules'.
@pytest.mark.parametrize(("backend", "dtype"), [("compiled", "fp32"), ("compiled", "bf16"), ("program", "fp32")])
def test_it_decodes(backend: str, dtype: str, untied: Path, tmp_path: Path) -> None:
    """Dense and sparse, with cache and dtype of activations, by each backend that runs on a CPU."""
    quantize.quantize_folder(untied, tmp_path / "out", INT8)
    engine = Engine.load(str(tmp_path / "out"), device="cpu", dtype=dtype, backend=backend)
    eager = Engine.load(str(tmp_path / "out"), device="cpu", dtype=dtype, backend="eager")
    texts = [list(e.generate([5, 9, 33], max_new_tokens=20, ignore_eos=True)) for e in (engine, eager)]
    assert texts[0] == texts[1] and len(texts[0]) == 20
    assert engine.dtype == engine.cache.k.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    dense = logits(eager.model)
    sparsify(eager.model, keep_all_plan(eager.model.config))
    assert_near("logits that drop nothing", logits(eager.model), dense, 1e-5 if dtype == "fp32" else 0.02)


def test_in_memory_as_in_a_folder(untied: Path, quantizable_folder: Path, tmp_path: Path) -> None:
    for source, head in ((untied, None), (quantizable_folder, "int8")):
        scheme = QuantConfig("int8", 32, lm_head=head is not None, embedding=True)
        quantize.quantize_folder(source, out := tmp_path / f"out-{head}", scheme)
        model = load_model(source, CPU, torch.float32)
        quantize_in_memory(model, "int8", lm_head=head, embedding=True)
        assert torch.equal(logits(model), logits(load_model(out, CPU, torch.float32)))
    with pytest.raises(UserError, match="embedding int8: this model's head is the same weight"):
        quantize_in_memory(load_model(quantizable_folder, CPU, torch.float32), "int8", embedding=True)


def test_the_command(untied: Path, quantizable_folder: Path, tmp_path: Path, call_main: Command) -> None:
    command = ("--mode", "int8", "--embedding", "int8", "-o", tmp_path / "out")
    code, _, err = call_main(quantize.main, "--checkpoint", untied, *command)
    assert code == 0, err
    model = load_model(tmp_path / "out", CPU, torch.float32)
    assert isinstance(model.embedding, QuantizedEmbedding) and not isinstance(model.lm_head, QuantizedLinear)
    options = ("--text", ROOT / "README.md", "--tokens", "64", "--window", "32", "--stride", "16", "--dtype", "fp32")
    measured = ("--checkpoint", tmp_path / "out", "--reference", untied, "--sparsity", "0", "--device", "cpu", "--json")
    code, _, err = call_main(evaluate.main, *measured, *options)
    assert code == 0, err
    code, _, err = call_main(quantize.main, "--checkpoint", quantizable_folder, *command, "--force")
    assert_one_line_error(code, err, "--embedding int8: this model's head is the same weight", "--lm-head int8")
    again = ("--checkpoint", quantizable_folder, *command, "--force", "--lm-head", "int8")
    assert call_main(quantize.main, *again)[0] == 0
    assert stored_config(tmp_path / "out").tie_embeddings


CHANGES = {
    "of a reader": ({"version": 1}, "mode int8 has version 1; expected 3"),
    "no switch": ({"embedding": "int8"}, "embedding 'int8' is not usable; expected true or false"),
    "in floats": ({"embedding": False, "version": 1}, "unexpected tensor model.embed_tokens.qweight"),
    "groups": ({"group_size": 64}, "group_size 64 does not fit the k and v width 32"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_config_is_one_line(name: str, untied: Path, tmp_path: Path) -> None:
    change, fragment = CHANGES[name]
    quantize.quantize_folder(untied, out := tmp_path / "out", INT8)
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load_model(out, CPU, torch.float32)
    assert fragment in str(error.value) and str(out) in str(error.value) and "\n" not in str(error.value)


def test_a_tied_folder_without_a_rounded_head_is_refused(quantizable_folder: Path, tmp_path: Path) -> None:
    quantize.quantize_folder(quantizable_folder, out := tmp_path / "out", TIED)
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"]["lm_head"] = False
    (out / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="this model's head is the same weight"):
        load_model(shutil.copytree(out, tmp_path / "copy"), CPU, torch.float32)
