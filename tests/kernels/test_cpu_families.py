"""The step program on a CPU against the eager model, for what families have beyond a plain one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from teal.checkpoint.weights import load_model
from teal.decoding import cpu_program
from teal.decoding.backend import EagerBackend
from teal.decoding.backends import choose_backend
from teal.decoding.cpu_program import program_obstacle
from teal.errors import UserError
from teal.extras import extras
from teal.layers.int8_cache import use_int8_cache
from teal.layers.quantized_linear import use_quantized_linears
from teal.model import Transformer
from tests.block_models import use_random_blocks
from tests.checkpoint.test_families import FAMILIES
from tests.conftest import QUANTIZABLE, assert_near, save_tiny_model, tiny_config
from tests.kernels.test_cpu_program import (
    BLOCKS,
    CPU,
    FORMATS,
    LAYERS,
    SPARSE_LIMITS,
    check,
    fill_mixed,
    program,
    run,
    thresholded,
)

CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
# Between them they have all of extras.py, at sizes that can be quantized.
EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"head_dim": 32, **WINDOWS, **CAPS}),
    "gemma3": ("gemma3_text", {"head_dim": 32, **WINDOWS, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "yarn": FAMILIES["llama-yarn"],
}
DENSE_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
LENGTHS = ((5,), (3, 12, 9), (4, 11, 6, 3, 17, 8, 2, 7))
either = pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])


def built(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Transformer:
    """A model of LAYERS layers with these extras."""
    family, options = EXTRAS[kind]
    save_tiny_model(tiny_config(family, **QUANTIZABLE | {"num_hidden_layers": LAYERS} | options | sizes), folder)
    return load_model(folder, CPU, dtype)


def check_rows(model: Transformer) -> None:
    """The program's logits are the eager model's, of the median row to 1e-5.

    An entry of a few rows may be rounded to the other side of a threshold, or to another byte. Norms after sublayers
    enlarge what is lost of a small sum.
    """
    for lengths in LENGTHS:
        found, expected = run(program(model), lengths)[0], run(EagerBackend(model, "test"), lengths)[0]
        errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(errors.median()) <= 1e-5, f"relative errors of steps and rows {errors.tolist()}"
        assert_near("logits", found, expected, 1e-2)


@either
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path: Path, name: str, sparse: bool) -> None:
    family, options = FAMILIES[name]
    save_tiny_model(tiny_config(family, **options), tmp_path)
    model = thresholded(load_model(tmp_path, CPU, torch.float32), sparse)
    assert choose_backend(model).name == "program"
    for lengths in ((5,), (3, 12, 30)):
        check(model, lengths, 1e-5)


def test_together_the_models_have_every_extra(tmp_path: Path) -> None:
    found = {name for kind in EXTRAS for name in extras(built(tmp_path / kind, kind).config)}
    assert found == cpu_program.COMPUTED


@either
@pytest.mark.parametrize("kind", EXTRAS)
@pytest.mark.parametrize("dtype", DENSE_LIMITS, ids=str)
def test_dtypes(tmp_path: Path, kind: str, sparse: bool, dtype: torch.dtype) -> None:
    model = thresholded(built(tmp_path, kind, dtype), sparse)
    check(model, (3, 12), (SPARSE_LIMITS if sparse else DENSE_LIMITS)[dtype])


@either
@pytest.mark.parametrize("format", [name for name, scheme in FORMATS.items() if scheme])
@pytest.mark.parametrize("kind", EXTRAS)
def test_integers(tmp_path: Path, kind: str, format: str, sparse: bool) -> None:
    model, scheme = built(tmp_path, kind, vocab_size=320), FORMATS[format]
    assert scheme is not None
    use_quantized_linears(model, scheme, fill=not scheme.is_mixed)
    if scheme.is_mixed:
        fill_mixed(model)
    check_rows(thresholded(model, sparse))


@either
@pytest.mark.parametrize("format", ["Q4_K_M", "some"])
@pytest.mark.parametrize("kind", EXTRAS)
def test_blocks_of_gguf(tmp_path: Path, kind: str, format: str, sparse: bool) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    sizes: dict[str, Any] = {"vocab_size": 333, "hidden_size": 256, "intermediate_size": 768, **heads}
    model = built(tmp_path, kind, tie_word_embeddings="head" not in BLOCKS[format], **sizes)
    use_random_blocks(model, BLOCKS[format], scale=0.01)
    check_rows(thresholded(model, sparse))


@either
@pytest.mark.parametrize("kind", EXTRAS)
def test_a_cache_in_8_bits(tmp_path: Path, kind: str, sparse: bool) -> None:
    model = thresholded(built(tmp_path, kind), sparse)
    use_int8_cache(model)
    check_rows(model)


def test_a_soft_cap_over_several_chunks_of_positions(tmp_path: Path) -> None:
    model = built(tmp_path, "gemma2", max_position_embeddings=1024)
    for length in (255, 256, 600):
        check(model, (length, 3), 1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_bits_depend_on_neither_threads_nor_other_rows(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, lengths = program(built(tmp_path, kind, torch.bfloat16)), (3, 12, 9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = run(backend, lengths)[0]
    assert torch.equal(run(backend, (3, 12))[0], expected[:, :2]), "another row beside it"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(run(backend, lengths)[0], expected), "3 threads"


def test_choose_caps_the_logits_that_it_compares(tmp_path: Path) -> None:
    model = built(tmp_path, "gemma2")
    tokens, positions = torch.tensor([[5]]), torch.tensor([[0]])
    with torch.inference_mode():
        model.lm_head.weight *= 1000.0  # so that the cap makes many equal
        logits = program(model).choose(tokens, positions, model.new_cache(1, 8))
    assert logits is not None and int((logits == 3.0).sum()) > 1
    assert int(tokens) == int(logits.argmax())


def test_what_it_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name in extras.py, alone."""
    model = built(tmp_path, "gemma2")
    assert program_obstacle(model) == ""
    monkeypatch.setattr(cpu_program, "extras", lambda config: [*extras(config), "experts"])
    assert program_obstacle(model) == "it does not compute experts"
    with pytest.raises(UserError, match="backend program cannot run: it does not compute experts"):
        choose_backend(model, forced="program")
    chosen = choose_backend(model)
    assert isinstance(chosen, EagerBackend) and chosen.reason == "program cannot run: it does not compute experts"
