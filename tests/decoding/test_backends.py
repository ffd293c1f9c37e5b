"""Backends: which one is chosen and why, that all compute the same, and that phases are said and not guessed."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.weights import load_model
from teal.decoding import backends
from teal.decoding.backend import Backend, CompiledBackend, EagerBackend
from teal.decoding.backends import FusedBackend, best_backend, choose_backend
from teal.decoding.engine import Engine
from teal.errors import UserError
from teal.layers.int8_cache import use_int8_cache
from teal.layers.phase import Phase, PhasedModule, call_state, decoding
from teal.layers.quantized_linear import QuantConfig, use_quantized_linears
from teal.layers.team import Team
from teal.model import Block, Transformer
from teal.options import ModelOptions
from teal.parallel import Rank
from teal.plan import ProjectionPlan, SparsityPlan
from teal.teal_layers import sparse_layers, sparse_prefill, sparsify
from tests.conftest import PROJECTIONS, QUANTIZABLE, relative_error, save_tiny_model, tiny_config

CPU = torch.device("cpu")
IDS = (torch.arange(20) * 7 % 190 + 5)[None]
PLACES = torch.arange(20)[None]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile traces and guards, but runs what it traced without Inductor, in a fraction of the time."""
    compile = torch.compile

    def traced(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return compile(function, backend="eager", fullgraph=options["fullgraph"])

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(folder: Path, kind: str, layers: int = 2) -> Transformer:
    """A model of so many layers: dense, sparse, quantized or with an int8-cache."""
    save_tiny_model(tiny_config("llama", **QUANTIZABLE, vocab_size=320, num_hidden_layers=layers), folder)
    model = load_model(folder, CPU, torch.float32)
    if kind == "sparse":
        layer = {name: ProjectionPlan(0.5, 0.3) for name in PROJECTIONS}
        sparsify(model, SparsityPlan({}, "test", 0.5, (layer,) * layers))
    elif kind == "quantized":
        use_quantized_linears(model, QuantConfig("int8", 32, lm_head=True), fill=True)
    elif kind == "int8-cache":
        use_int8_cache(model)
    return model


@torch.inference_mode()
def run(backend: Backend, parts: tuple[int, ...] = (6, 3), steps: int = 2) -> Tensor:
    """Logits [1, n, V] of prefill calls of so many tokens and of decode steps after them."""
    cache, outputs, begin = backend.model.new_cache(1, 24), [], 0
    for count in (*parts, *(0,) * steps):  # 0: a step
        end = begin + max(count, 1)
        call = backend.prefill if count else backend.decode
        outputs.append(call(IDS[:, begin:end].clone(), PLACES[:, begin:end].clone(), cache))  # at offset 0, as engines'
        begin = end
    return backend.logits(torch.cat(outputs, dim=1))


@pytest.mark.parametrize(
    "device,kernel_layout,int8_cache,compile,expected",
    [
        ("cpu", False, False, None, "program"),
        ("cpu", True, True, False, "program"),
        ("cpu", True, False, True, "compiled"),
        ("cuda", False, False, None, "compiled"),
        ("cuda", False, False, True, "compiled"),
        ("cuda", False, False, False, "eager"),
        ("cuda", True, False, None, "fused"),
        ("cuda", True, False, False, "fused"),
        ("cuda", False, True, None, "fused"),
    ],
)
def test_the_choice(device: str, kernel_layout: bool, int8_cache: bool, compile: bool | None, expected: str) -> None:
    name, reason = best_backend(device, kernel_layout, int8_cache, compile)
    assert name == expected and reason and "\n" not in reason


@pytest.mark.parametrize("forced,kind", [("eager", EagerBackend), ("compiled", CompiledBackend)])
def test_a_forced_backend_is_the_engines(tiny_folder: Path, forced: str, kind: type, traced_only: None) -> None:
    loaded = load_for_decoding(ModelOptions(str(tiny_folder), device="cpu", dtype="fp32"))
    engine = Engine.from_loaded(loaded, None, backend=forced)
    assert type(engine.backend) is kind and engine.backend.model is engine.model
    assert (engine.backend.name, engine.backend.reason) == (forced, "asked for")
    assert len(list(engine.generate([5, 9, 33], max_new_tokens=4, ignore_eos=True))) == 4


def test_a_cpu_decodes_by_the_program_or_says_why_not(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_for_decoding(ModelOptions(str(tiny_folder), device="cpu", dtype="fp32"))
    engine = Engine.from_loaded(loaded, None)
    assert (engine.backend.name, engine.backend.reason) == ("program", "a step is one native call on a CPU")
    assert engine.backend.keeps_modules, "a sparsity may be calibrated beside it"
    expected = list(engine.generate([5, 9, 33], max_new_tokens=20, ignore_eos=True))
    eager = Engine.from_loaded(loaded, None, backend="eager")
    assert list(eager.generate([5, 9, 33], max_new_tokens=20, ignore_eos=True)) == expected
    assert choose_backend(loaded.model, forced="program").reason == "asked for"
    monkeypatch.setattr("teal.decoding.cpu_program.native_kernels", lambda: None)
    chosen = choose_backend(loaded.model)
    assert (chosen.name, chosen.reason) == ("eager", "program cannot run: there are no compiled kernels")
    with pytest.raises(UserError, match="backend program cannot run: there are no compiled kernels"):
        choose_backend(loaded.model, forced="program")


@pytest.mark.parametrize(
    "capability,scheme,pays",
    [
        ((9, 0), None, True),
        ((9, 0), QuantConfig("int8", 32), True),
        ((9, 0), QuantConfig("int4", 32), True),
        ((9, 0), QuantConfig("int8", 32, lm_head=True, head_bits=4), True),
        ((9, 0), QuantConfig("mixed", 32, average_bits=5.0, refined=((1, 0, 0, 0), (0, 0, 0, 0))), True),
        ((9, 0), QuantConfig("int4", 32, grouping="input"), True),
        ((8, 0), None, False),
    ],
    ids=["floats", "int8", "int4", "int4-head", "mixed", "int4-input", "A100"],
)
def test_where_the_cuda_program_pays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    scheme: QuantConfig | None,
    pays: bool,
) -> None:
    model = tiny(tmp_path, "dense" if scheme else "sparse")
    if scheme is not None:
        use_quantized_linears(model, scheme, fill=True)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends._program_pays(model) is pays
    use_int8_cache(model)
    assert backends._program_pays(model) is pays, "whatever the cache is kept in"
    name, _ = best_backend("cuda", True, False, None, pays)
    assert name == ("program" if pays else "fused")


@pytest.mark.parametrize(
    ("ranks", "room", "quant", "pays"),
    [(2, 0, None, True), (2, 0, "int8", True), (2, 0, "int4", True), (2, -1, None, False), (4, 0, None, False)],
)
def test_where_two_gpus_take_the_program(
    ranks: int, room: int, quant: str | None, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tmp_path, "dense" if quant else "sparse")
    if quant is not None:
        use_quantized_linears(model, QuantConfig(quant, 32), fill=True)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "team_of", lambda _: Team(Rank(0, ranks), torch.device("cuda")))
    monkeypatch.setattr(backends, "PAIR_CHANNELS", model.config.hidden_size + room)
    assert backends._program_pays(model) is pays


@pytest.mark.parametrize(
    "error,reason",
    [
        (UserError("a weight is not contiguous"), "program cannot run: a weight is not contiguous"),
        (torch.OutOfMemoryError(), "program cannot run: its tables need more memory than the GPU has left"),
    ],
)
def test_others_run_where_the_program_cannot(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: EagerBackend) -> None:
        raise error

    others = EagerBackend(tiny(tmp_path, "dense"), "test")
    monkeypatch.setattr("teal.decoding.cuda_program.CudaProgramBackend", fail)
    monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
    assert backends._program(others, False) is others and others.reason == reason
    with pytest.raises((UserError, torch.OutOfMemoryError)):
        backends._program(others, True)


def test_what_cannot_be_forced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path, "dense")
    monkeypatch.setattr("teal.kernels.gemv.launch.kernels_run_on", lambda device: False)
    for arguments, message in (
        ((None, "fused"), "backend fused cannot run: its kernels need CUDA, and the model is on cpu"),
        ((None, "fastest"), "backend fastest: unknown; expected one of auto, eager, compiled, fused, program"),
        ((True, "eager"), "backend eager contradicts compile=True"),
        ((False, "compiled"), "backend compiled contradicts compile=False"),
    ):
        with pytest.raises(UserError, match=message):
            choose_backend(model, *arguments)


def test_a_block_of_other_projections_is_not_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path, "sparse")
    monkeypatch.setattr(backends, "FUSED_INPUTS", ("normed", "attended", "activated"))
    with pytest.raises(UserError, match="backend fused cannot run: its kernels take inputs normed, attended, activ"):
        choose_backend(model, forced="fused")
    monkeypatch.setattr(backends, "best_backend", lambda *_: ("fused", "sparse weights on CUDA"))
    chosen = choose_backend(model, compile=False)
    assert chosen.name == "eager" and chosen.reason.startswith("fused cannot run: its kernels take inputs normed")


@pytest.mark.parametrize("kind", ["dense", "sparse", "quantized", "int8-cache"])
def test_backends_agree_and_leave_the_model_alone(tmp_path: Path, kind: str, traced_only: None) -> None:
    model = tiny(tmp_path, kind)
    size = sum(p.nbytes for p in model.parameters())
    expected = run(EagerBackend(model, "test"), steps=1)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    compiled = run(CompiledBackend(model, "test"), steps=1)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    tolerance = 1e-3 if kind == "int8-cache" else 1e-5  # a byte may be rounded the other way
    assert relative_error(compiled, expected) <= tolerance, "compiled"
    fused = run(FusedBackend(model, "test", compile=False), steps=1)
    assert relative_error(fused, expected) <= tolerance, "fused"
    assert all(type(block) is Block for block in model.layers)
    assert sum(p.nbytes for p in model.parameters()) == size


def test_one_graph_serves_all_layers_and_lengths(tmp_path: Path, traced_only: None) -> None:
    """What is compiled does not grow with depth, calls, lengths or the cache; a prefill of one token adds nothing."""
    for layers in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        backend = CompiledBackend(tiny(tmp_path, "sparse", layers), "test")
        for parts in ((6,), (6, 3), (9, 1, 2), (1,)):
            run(backend, parts, steps=3)
        assert counters["stats"]["unique_graphs"] == 2, f"{layers} layers: prefill and decode"


@pytest.mark.parametrize("backend", [EagerBackend, CompiledBackend])
def test_one_token_of_a_prompt_is_dense_and_a_generated_one_sparse(
    tmp_path: Path, backend: type[Backend], traced_only: None
) -> None:
    dense = run(EagerBackend(tiny(tmp_path, "dense"), "test"), (1, 1, 1), steps=0)
    model = tiny(tmp_path, "sparse")
    assert relative_error(run(backend(model, "test"), (1, 1, 1), steps=0), dense) <= 1e-6, "prefill"
    assert relative_error(run(backend(model, "test"), (1, 1), steps=1)[:, 2], dense[:, 2]) > 1e-2, "decode"
    with torch.inference_mode():
        plain = model(IDS[:, :1], PLACES[:, :1], model.new_cache(1, 8))
        assert relative_error(plain, dense[:, :1]) <= 1e-6, "a plain call"
        with sparse_prefill(model):
            sparse = model(IDS[:, :1], PLACES[:, :1], model.new_cache(1, 8))
            assert relative_error(sparse, dense[:, :1]) > 1e-2, "a plain call in a sparse prefill"


def test_a_failed_step_ends_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(tmp_path, "sparse")
    backend = EagerBackend(model, "test")
    monkeypatch.setattr(model, "hidden_states", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backend.decode(IDS[:, :1], PLACES[:, :1], model.new_cache(1, 8))
    assert call_state(model).phase is Phase.PREFILL
    with pytest.raises(AssertionError, match="one token a row"):
        backend.decode(IDS, PLACES, model.new_cache(1, 24))


def test_models_do_not_share_their_phase(tmp_path: Path) -> None:
    """Not even a copy on the same tensors, such as a draft."""
    model = tiny(tmp_path, "sparse")
    call_state(model)
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared)
    with decoding(model):
        assert all(module.state.phase is Phase.DECODE for layer in sparse_layers(model) for module in layer)
        assert all(module.state.phase is Phase.PREFILL for layer in sparse_layers(twin) for module in layer)
    states = {id(module.state) for module in twin.modules() if isinstance(module, PhasedModule)}
    assert len(states) == 1, "one state serves all modules of a model"
