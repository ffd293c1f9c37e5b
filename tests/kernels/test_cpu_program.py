"""The whole step on a CPU against the eager model: families, formats, rows at positions of their own, bits."""

import functools
import itertools
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teal.checkpoint.weights import load_model
from teal.decoding.backend import Backend, EagerBackend
from teal.decoding.cpu_program import CpuProgramBackend, program_obstacle
from teal.errors import UserError
from teal.layers.block_linear import widen_blocks
from teal.layers.int8_cache import use_int8_cache
from teal.layers.output_head import use_native_head
from teal.layers.quantized_linear import QuantConfig, QuantizedLinear, use_quantized_linears
from teal.layers.rounding import quantize
from teal.model import OutputHead, Transformer
from teal.plan import ProjectionPlan, SparsityPlan
from teal.teal_layers import set_counting, sparse_layers, sparsify
from tests.block_models import use_random_blocks
from tests.conftest import PROJECTIONS, QUANTIZABLE, assert_near, relative_error, save_tiny_model, tiny_config

CPU = torch.device("cpu")
LAYERS, STEPS = 2, 3
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),  # heads of 8 channels
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2-bias": ("qwen2", {}),
    "qwen3-norms": ("qwen3", {"head_dim": 20}),
}
FORMATS: dict[str, QuantConfig | None] = {
    "floats": None,
    "int8": QuantConfig("int8", 32, lm_head=True),
    "int4": QuantConfig("int4", 32, lm_head=True, head_bits=4),
    "int8-input": QuantConfig("int8", 32, grouping="input"),
    "int4-input": QuantConfig("int4", 32, grouping="input"),
    "mixed": QuantConfig(
        "mixed", 32, lm_head=True, head_bits=4, average_bits=5.0, refined=((8, 0, 33, 5),) * LAYERS, refined_head=9
    ),
}
# Types of GGUF: of all weights; as llama.cpp mixes them, with a head of its own; some weights, others in floats.
BLOCKS: dict[str, dict[str, str]] = {
    **{kind: dict.fromkeys((*PROJECTIONS, "embedding"), kind) for kind in ("Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K")},
    "Q4_K_M": {
        name: {"v": "Q6_K", "down": "Q5_K", "head": "Q6_K"}.get(name, "Q4_K") for name in (*PROJECTIONS, "head")
    },
    "some": {"q": "Q5_0", "k": "Q5_0", "v": "Q8_0", "down": "Q4_1", "gate": "Q4_0", "embedding": "Q8_0"},
}
# Rounding of a few values the other way, in bf16 and fp16, bounds the error there: of a residual stream of two blocks.
# An entry that such a rounding carries over its threshold counts for more: these models have 48 to 96 channels. Without
# thresholds their logits are 2e-1 away.
SPARSE_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.2e-1, torch.float16: 4e-2}
TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
ONE_ENTRY = 2e-1  # that a wrong entry of these models may cost; without thresholds it is as much
THRESHOLDS = {"q": 0.3, "k": 0.3, "v": 0.2, "o": 0.1, "gate": 0.4, "up": 0.3, "down": 0.2}


def thresholded(model: Transformer, sparse: bool) -> Transformer:
    """model with thresholds, in place, if it is to have them."""
    if sparse:
        layer = {name: ProjectionPlan(0.5, THRESHOLDS[name]) for name in PROJECTIONS}
        sparsify(model, SparsityPlan({}, "test", 0.5, (layer,) * model.config.num_layers))
    return model


def tiny(
    folder: Path,
    family: str = "llama",
    format: str = "floats",
    sparse: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    """A model of LAYERS layers, its projections as asked for."""
    name, options = FAMILIES[family]
    sizes = {} if FORMATS[format] is None else QUANTIZABLE | {"vocab_size": 320}
    config = tiny_config(name, **({"num_hidden_layers": LAYERS} | options | sizes))
    save_tiny_model(config, folder)
    model = load_model(folder, CPU, dtype)
    if (scheme := FORMATS[format]) is not None:
        use_quantized_linears(model, scheme, fill=not scheme.is_mixed)
        if scheme.is_mixed:
            fill_mixed(model)
    return thresholded(model, sparse)


def in_blocks(folder: Path, format: str, sparse: bool = False, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model of LAYERS layers with weights of GGUF's types, its head tied to its embedding if it has none."""
    kinds = BLOCKS[format]
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    tied = {"tie_word_embeddings": "head" not in kinds}
    save_tiny_model(tiny_config("qwen2", num_hidden_layers=LAYERS, vocab_size=333, **sizes, **tied), folder)
    model = load_model(folder, CPU, dtype)
    use_random_blocks(model, kinds, scale=0.01)
    return thresholded(model, sparse)


def fill_mixed(model: Transformer) -> None:
    """Random integers, small scales, and every third channel refined."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if not isinstance(module, QuantizedLinear):
            continue
        words = torch.randint(-(2**31), 2**31 - 1, module.weight.shape, generator=generator, dtype=torch.int64)
        module.weight.copy_(words.to(torch.int32))
        module.scales.copy_(torch.rand(module.scales.shape, generator=generator) * 0.03)
        assert module.zeros is not None
        module.zeros.copy_(torch.randint(4, 12, module.zeros.shape, generator=generator))
        if module.refined is not None:
            module.refined.copy_(torch.arange(len(module.refined)))


def program(model: Transformer) -> CpuProgramBackend:
    return CpuProgramBackend(EagerBackend(model, "test"))


@torch.inference_mode()
def run(backend: Backend, lengths: tuple[int, ...], first: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [STEPS, rows, V] after prompts of these lengths, and the cache's keys and values.

    first: the token that the first row decodes first.
    """
    rows, cache = len(lengths), backend.model.new_cache(len(lengths), max(lengths) + STEPS + 3)
    for r, length in enumerate(lengths):
        ids = (torch.arange(length) * 7 % 190 + 5)[None]
        EagerBackend(backend.model, "test").prefill(ids, torch.arange(length)[None], cache.part(slice(r, r + 1), None))
    tokens = torch.arange(rows)[:, None] * 11 + first
    positions, found = torch.tensor(lengths)[:, None], []
    for _ in range(STEPS):
        found.append(backend.logits(backend.decode(tokens, positions, cache)[:, -1]))
        tokens, positions = (5 * tokens + 3) % 190, positions + 1
    return torch.stack(found), cache.k, cache.v


def check(model: Transformer, lengths: tuple[int, ...], limit: float) -> None:
    """The program's logits, keys and values are the eager model's.

    Of a sparse model they are with one of several tokens. A sum that lies at a threshold may go to another side of it
    on another processor, and that changes all that follows.
    """
    apart = 0.0
    for first in (9, 10, 12) if any(sparse_layers(model)) else (9,):
        found, expected = run(program(model), lengths, first), run(EagerBackend(model, "test"), lengths, first)
        parts = zip(("logits", "keys", "values"), found, expected, strict=True)
        errors = {name: relative_error(a, b) for name, a, b in parts if a.dtype != torch.int8}
        apart = max(apart, *errors.values())
        if max(errors.values()) <= limit:
            break
    else:
        raise AssertionError(f"relative errors {errors}, at most {limit:.0e} was expected")
    assert apart < ONE_ENTRY, f"relative error {apart:.1e} with another token"


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype,limit", TOLERANCES, ids=str)
def test_families(tmp_path: Path, family: str, sparse: bool, dtype: torch.dtype, limit: float) -> None:
    check(tiny(tmp_path, family, sparse=sparse, dtype=dtype), (3, 12), SPARSE_LIMITS[dtype] if sparse else limit)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype,limit", TOLERANCES, ids=str)
def test_formats(tmp_path: Path, format: str, sparse: bool, dtype: torch.dtype, limit: float) -> None:
    model = tiny(tmp_path, "qwen2-bias", format, sparse, dtype)
    for lengths in ((5,), (3, 9, 4, 17, 6)):
        check(model, lengths, SPARSE_LIMITS[dtype] if sparse else limit)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("format", BLOCKS)
@pytest.mark.parametrize("dtype,limit", TOLERANCES, ids=str)
def test_blocks(tmp_path: Path, format: str, sparse: bool, dtype: torch.dtype, limit: float) -> None:
    model = in_blocks(tmp_path, format, sparse, dtype)
    for lengths in ((5,), (3, 9, 4, 17, 6)):
        check(model, lengths, SPARSE_LIMITS[dtype] if sparse else limit)


@pytest.mark.parametrize("format", BLOCKS)
def test_blocks_are_the_floats_that_they_stand_for(tmp_path: Path, format: str) -> None:
    model, lengths = in_blocks(tmp_path, format), (5, 8)
    found = run(program(model), lengths)[0]
    widen_blocks(model)
    assert_near("logits", found, run(EagerBackend(model, "test"), lengths)[0], 1e-5)


@pytest.mark.parametrize("dtype,limit", TOLERANCES, ids=str)
def test_a_rounded_embedding(tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
    save_tiny_model(tiny_config("llama", num_hidden_layers=LAYERS, **QUANTIZABLE | {"vocab_size": 320}), tmp_path)
    model = quantize(load_model(tmp_path, CPU, dtype), "int8", 32, embedding=True)
    check(model, (5, 8), limit)


@pytest.mark.parametrize("dtype,limit", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3-norms"])
def test_a_cache_in_8_bits(tmp_path: Path, family: str, dtype: torch.dtype, limit: float) -> None:
    model = tiny(tmp_path, family, dtype=dtype)
    use_int8_cache(model)
    check(model, (4, 11), limit)


def test_it_writes_the_bytes_that_the_module_writes(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    use_int8_cache(model)
    found, expected = run(program(model), (4,)), run(EagerBackend(model, "test"), (4,))
    D = model.config.head_dim
    for part in (1, 2):
        apart = (found[part][..., :D].int() - expected[part][..., :D].int()).abs()
        assert apart.max() <= 1 and apart.count_nonzero() <= 2, "a byte may be rounded the other way"


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_several_chunks_of_positions(tmp_path: Path, family: str) -> None:
    """A cache that attention cuts, with positions beside the cuts."""
    model = tiny(tmp_path, family)
    for length in (254, 255, 256, 600):
        check(model, (length, 3), 1e-5)


@pytest.mark.parametrize("heads,kv_heads,head_dim", [(3, 1, 64), (5, 1, 80), (14, 2, 16), (6, 1, 136), (2, 2, 24)])
def test_heads_that_share_keys(tmp_path: Path, heads: int, kv_heads: int, head_dim: int) -> None:
    """Any number of heads, and sizes that are whole vectors, several at once, or neither."""
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    save_tiny_model(tiny_config("llama", num_hidden_layers=LAYERS, head_dim=head_dim, **sizes), tmp_path)
    model = load_model(tmp_path, CPU, torch.float32)
    for length in (6, 257):
        check(model, (length, 3), 1e-5)


def test_a_window_that_begins_within_a_chunk(tmp_path: Path) -> None:
    save_tiny_model(tiny_config("mistral", sliding_window=300, num_hidden_layers=LAYERS), tmp_path)
    check(load_model(tmp_path, CPU, torch.float32), (530, 290), 1e-5)


@pytest.mark.parametrize(
    "format,sparse", itertools.product(("floats", "int4", "int4-input", "mixed", "Q4_K_M"), (False, True))
)
def test_bits_depend_on_neither_threads_nor_other_rows(
    tmp_path: Path, format: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.bfloat16
    blocks = format in BLOCKS
    model = in_blocks(tmp_path, format, sparse, dtype) if blocks else tiny(tmp_path, "llama", format, sparse, dtype)
    backend = program(model)
    lengths = (3, 300, 9, 4, 17, 6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = run(backend, lengths)[0]
    for threads in (2, 3, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(run(backend, lengths)[0], expected), f"{threads} threads"
    with torch.inference_mode():
        cache = model.new_cache(2, 20)
        tokens, positions = torch.tensor([[9], [20]]), torch.tensor([[0], [0]])
        together = backend.decode(tokens, positions, cache)
        alone = [
            backend.decode(t[None], p[None], model.new_cache(1, 20)) for t, p in zip(tokens, positions, strict=True)
        ]
    assert torch.equal(together, torch.cat(alone)), "a row alone has other bits"


def test_choose_is_the_argmax_of_its_logits(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    use_native_head(model)
    backend, cache = program(model), model.new_cache(3, 8)
    tokens, positions = torch.tensor([[5], [6], [7]]), torch.tensor([[0], [0], [0]])
    with torch.inference_mode():
        logits = backend.logits(backend.decode(tokens, positions, cache)[:, -1])
        chosen = backend.choose(tokens, positions, cache)
    assert chosen is not None and torch.equal(chosen, logits)
    assert torch.equal(tokens[:, 0], logits.argmax(-1)) and positions.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize("kind", ["ties", "nan"])
def test_the_argmax_of_ties_and_nan_is_torchs(tmp_path: Path, kind: str) -> None:
    model = tiny(tmp_path)
    with torch.inference_mode():
        if kind == "ties":
            model.lm_head.weight.copy_(model.lm_head.weight[:1].expand_as(model.lm_head.weight))
        else:
            model.lm_head.weight[77] = math.nan
        tokens, positions = torch.tensor([[5]]), torch.tensor([[0]])
        logits = program(model).choose(tokens, positions, model.new_cache(1, 8))
    assert logits is not None
    assert int(tokens) == {"ties": 0, "nan": 77}[kind] == int(logits.argmax())


def test_new_thresholds_are_read(tmp_path: Path) -> None:
    """Those put in place of others, and those copied over them."""
    model = tiny(tmp_path, sparse=True)
    backend = program(model)
    before = run(backend, (5,))[0]
    for thresholds in ([0.0] * 3, [0.7, 0.2, 0.9], [0.6, 0.1, 0.8]):
        sparse_layers(model)[0][0].set_thresholds(thresholds)
        after = run(backend, (5,))[0]
        assert relative_error(after, before) > 1e-4, "the thresholds before them"
        assert_near("logits", after, run(EagerBackend(model, "test"), (5,))[0], 1e-5)
        before = after


def test_counted_steps_go_through_the_modules(tmp_path: Path) -> None:
    model = tiny(tmp_path, sparse=True)
    backend = program(model)
    set_counting(model, True)
    run(backend, (5,))
    assert int(sparse_layers(model)[0][0].seen) == STEPS * model.config.hidden_size
    with torch.inference_mode():
        assert backend.choose(torch.tensor([[1]]), torch.tensor([[0]]), model.new_cache(1, 4)) is None


def test_many_rows_go_through_the_modules(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    check(model, (3,) * 9, 1e-5)
    tokens = torch.ones(9, 1, dtype=torch.int64)
    assert program(model).choose(tokens, torch.zeros_like(tokens), model.new_cache(9, 4)) is None


def test_what_is_out_of_range_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    backend, cache = program(model), model.new_cache(1, 4)
    for token, position, message in (
        (199, 0, "a token is out of range; expected 0 to 198"),
        (-1, 0, "a token is out of range"),
        (3, 4, "a position is out of range; expected 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.decode(torch.tensor([[token]]), torch.tensor([[position]]), cache)


def test_obstacles_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path)
    assert program_obstacle(model) == ""

    class OtherHead(OutputHead):
        pass

    head = OtherHead(4, 4, device="meta")
    head.weight, plain = model.lm_head.weight, model.lm_head
    model.lm_head = head
    assert program_obstacle(model) == "a head of OtherHead is not supported"
    model.lm_head = plain
    model.blocks[1].feed_forward.down = torch.nn.Identity()  # type: ignore[assignment]
    assert program_obstacle(model) == "projections of Identity are not supported"
    odd = tiny(tmp_path / "odd").to(torch.float64)
    assert program_obstacle(odd) == "dtype float64 is not supported; expected fp32, bf16 or fp16"
    monkeypatch.setattr("teal.decoding.cpu_program.native_kernels", lambda: None)
    with pytest.raises(UserError, match="there are no compiled kernels"):
        program(tiny(tmp_path / "plain"))


def test_threads_of_several_models_take_turns(tmp_path: Path) -> None:
    """Steps of two models from two threads at once: each gives what it gives alone."""
    backends = [program(tiny(tmp_path / str(i), family)) for i, family in enumerate(("llama", "qwen2-bias"))]
    expected = [run(backend, (5, 9))[0] for backend in backends]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(20):
            if not torch.equal(run(backends[i], (5, 9))[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=functools.partial(repeat, i)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
