"""The decode program: what it refuses, how it is cut, that it compiles, and that it computes what the model says."""

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from teal.bench.steps import phase_times
from teal.decoding.backend import EagerBackend
from teal.decoding.backends import FusedBackend
from teal.decoding.compilation import capture
from teal.decoding.cuda_program import CudaProgramBackend, model_obstacle
from teal.errors import UserError
from teal.kernels.formats.packing import Weight
from teal.kernels.program import launch
from teal.kernels.program.compiler import compile_source, compiler_obstacle
from teal.kernels.program.plan import MAX_STAGES, PRODUCTS, Device, part_of, pieces_and_splits, plan, shape_obstacle
from teal.layers.quantized_embedding import QuantizedEmbedding
from teal.layers.quantized_linear import QuantConfig, round_in_two_terms, use_quantized_linears
from teal.model import ModelConfig, Transformer
from teal.parallel import Rank
from teal.plan import ProjectionPlan, SparsityPlan
from teal.teal_layers import sparsify
from tests.conftest import PROJECTIONS, relative_error
from tests.kernels.emulated_program import COMPILER, emulated_backend
from tests.kernels.program_models import (
    A100,
    FAMILIES,
    H100,
    LLAMA_1B,
    LLAMA_3_8B,
    PROMPT,
    QWEN_7B,
    RTX_4090,
    SMALL,
    TINY,
    check_logits,
    check_on_gpu,
    described,
    expected_logits,
    one_step,
    program_logits,
    random_model,
    some_ids,
    use_int4_head,
)
from tests.token_logits import step_logits

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
FORMATS = {
    "floats": (None, False), "int8": ("int8", True), "int4": ("int4", False), "int4-head": ("int4", True),
    "mixed": ("mixed", False), "mixed-head": ("mixed", True),
}  # fmt: skip
# Rounding carries entries over their thresholds: modules in 16 bits are 0.06 to 0.16 from the reference. The
# program may be so many times as far. A wrong threshold gives 0.3 and more.
ROUNDED_OTHERWISE = 1.5


@pytest.mark.parametrize(
    "changes,device,message",
    [
        (
            {"head_dim": 96, "num_heads": 4, "num_kv_heads": 4},
            H100,
            "heads of 96 channels are not supported; expected 16, 32, 64, 128 or 256",
        ),
        ({"hidden_size": 20480}, H100, "hidden size 20480 is too large; expected at most 16384"),
        ({"num_kv_heads": 8}, replace(H100, multiprocessors=7), "8 groups of heads exceed 7 multiprocessors"),
        ({}, replace(H100, capability=(7, 5)), "compute capability 7.5 is too old; expected 8.0 or later"),
        ({}, replace(H100, shared_bytes=49152), "49152 bytes of shared memory are too few for hidden size 512"),
        ({"intermediate_size": 1400}, H100, "widths are no multiples of 32 columns, which are 16 bytes"),
    ],
)
def test_shapes_that_are_refused(changes: dict[str, Any], device: Device, message: str) -> None:
    model = described(replace(SMALL, **changes), 4, 8)
    assert shape_obstacle(model, device).startswith(message)
    with pytest.raises(ValueError, match=message):
        plan(model, device)


@pytest.mark.parametrize(
    "kind,message",
    [
        ("fits", ""),
        ("fp32", "weights of float32 are not supported; expected bf16 or fp16"),
        ("input groups", "groups along the input are not supported"),
        ("embedding", "an embedding of OutputHead is not supported"),
        ("dense", "weights are not in the kernels' layout"),
        ("capped", "it does not compute a soft cap of logits"),
    ],
)
def test_formats_that_are_refused(kind: str, message: str) -> None:
    config = replace(SMALL, num_layers=1, sliding_windows=(), logit_softcap=30.0 if kind == "capped" else None)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = Transformer(config).to(dtype).requires_grad_(False)
    grouping = "input" if kind == "input groups" else "output"
    if kind != "dense":
        use_quantized_linears(model, QuantConfig("int4", 128, grouping=grouping))
    if kind == "embedding":
        model.embedding = model.lm_head  # type: ignore[assignment]
    if kind == "fp32":
        model.lm_head.to(torch.bfloat16)
    assert model_obstacle(model, H100) == message
    with pytest.raises(UserError, match="its kernel needs CUDA, and the model is on cpu"):
        CudaProgramBackend(EagerBackend(model, "test"))


@pytest.mark.parametrize("piece_bytes", [128, 512])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("config", [LLAMA_3_8B, QWEN_7B, LLAMA_1B, SMALL], ids=["8B", "qwen", "1B", "small"])
def test_pieces_cover_the_columns_within_one_projection(config: ModelConfig, bits: int, piece_bytes: int) -> None:
    qkv = described(config, bits, 16).products[0]
    unit = math.gcd(config.q_size, config.kv_size) // qkv.columns
    piece, splits = pieces_and_splits(qkv, unit, H100.multiprocessors, 512, piece_bytes)
    assert qkv.granules % piece == 0 and qkv.granules // piece * splits <= H100.multiprocessors
    for end in (config.q_size, config.q_size + config.kv_size):
        assert end % (piece * qkv.columns) == 0, "a piece has columns of two projections"


@pytest.mark.parametrize("refined", [[], [191], list(range(64)), list(range(0, 192, 5))], ids=len)
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_block_finds_the_second_rows_of_its_channels(product: str, refined: list[int]) -> None:
    """Each has a place of its own in the panel of the block's part, with its row's scales."""
    K, N = 192, 384
    channels = torch.tensor(refined, dtype=torch.int32)
    values, scales, zeros = round_in_two_terms(torch.randn(K, N), channels, 32)
    weight = Weight(values, scales.half(), zeros, channels if refined else None)
    most = tuple((channels, torch.arange(8, dtype=torch.int32)) if name == product else () for name in PRODUCTS)
    config = replace(SMALL, hidden_size=K)
    found = plan(replace(described(config, 4, 4), refined=most), H100)
    gate_up = described(config, 4, 4).products[2]
    tables = launch.tables(weight, product, found, gate_up)
    assert tables.second is not None and tables.second_meta is not None and tables.meta is not None
    by_row = (lambda x: x.mT) if product == "MLP" else (lambda x: x)
    assert int((tables.second != 0).sum()) == len(refined)
    for j, channel in enumerate(refined):
        row, place = int(tables.second[channel]) & 0xFFFF, int(tables.second[channel]) >> 16
        part = int(part_of(product, torch.tensor([channel]), gate_up, found.sizes))
        assert row == K + j and place < found.sizes[f"{product}_SECONDS"]
        assert torch.equal(by_row(tables.second_meta)[part, place], by_row(tables.meta)[row])


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
@pytest.mark.parametrize("device", [A100, RTX_4090, H100], ids=["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize(
    "bits,head_bits,ranks", [(4, 8, 1), (8, 16, 1), (16, 16, 1), (4, 4, 1), (8, 4, 1), (16, 16, 2)]
)
def test_it_compiles_without_a_gpu(device: Device, bits: int, head_bits: int, ranks: int, tmp_path: Path) -> None:
    part = described(Rank(0, ranks).config(LLAMA_3_8B), bits, head_bits)
    found = plan(replace(part, ranks=ranks), device)
    assert found.shared_bytes <= device.shared_bytes
    cubin = compile_source(found.source, f"sm_{device.capability[0]}{device.capability[1]}")
    assert b"decode_step" in cubin
    if DISASSEMBLER.exists():
        (tmp_path / "cubin").write_bytes(cubin)
        run = subprocess.run([DISASSEMBLER, "-c", tmp_path / "cubin"], capture_output=True, text=True, check=True)
        odd = re.findall(r".*desc\[UR\d*[13579]\].*", run.stdout)
        assert "LDGSTS" in run.stdout and not odd, f"a GPU refuses {odd[:1]}: see gather.cuh's Turn"


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
def test_a_failed_compilation_says_where() -> None:
    with pytest.raises(UserError, match=r"compiling program.cu for sm_90 failed: .*error"):
        compile_source("#error no config", "sm_90")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("quant,lm_head", FORMATS.values(), ids=FORMATS)
def test_formats_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str | None, lm_head: bool) -> None:
    seed = {None: 0, "int8": 1, "int4": 6, "mixed": 1}[
        quant
    ]  # with which no entry is at its threshold but for rounding
    model = random_model(TINY, torch.float16, quant, lm_head, True, "cpu", seed)
    check_logits(emulated_backend(model, tmp_path, monkeypatch), 2e-3)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("quant", [None, "int4", "int8"])
def test_a_head_of_4_bits_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str | None) -> None:
    model = use_int4_head(random_model(TINY, torch.float16, quant, False, False, "cpu"))
    check_logits(emulated_backend(model, tmp_path, monkeypatch), 2e-3)
    assert "HEAD_BITS = 4;" in (tmp_path / "config.cuh").read_text()


def use_int8_embedding(model: Transformer) -> Transformer:
    """model with its embedding rounded, in place."""
    dense, model.embedding = model.embedding, QuantizedEmbedding(model.embedding, 32)  # type: ignore[assignment]
    model.embedding.round(dense.weight)  # type: ignore[operator]
    return model


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_an_embedding_of_8_bits_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = use_int8_embedding(random_model(TINY, torch.float16, "int4", False, False, "cpu"))
    check_logits(emulated_backend(model, tmp_path, monkeypatch), 2e-3)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("quant", [None, "int4", "mixed"])
def test_bits_do_not_depend_on_who_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str | None
) -> None:
    """Launches of the emulation run their threads in different orders."""
    backend = emulated_backend(random_model(TINY, torch.float16, quant, True, True, "cpu"), tmp_path, monkeypatch)
    first, *others = (program_logits(backend, some_ids(backend.model)) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("quant", ["int4", "mixed"])
def test_scales_row_by_row_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str) -> None:
    monkeypatch.setattr("teal.kernels.program.plan.MIN_SCALED_STAGES", MAX_STAGES + 1)
    model = random_model(TINY, torch.float16, quant, False, False, "cpu")
    check_logits(emulated_backend(model, tmp_path, monkeypatch), 2e-3)
    assert "SCALED = false" in (tmp_path / "config.cuh").read_text()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "quant,piece_bytes,share",
    [
        (None, 1, 1),
        (None, 100, 2),
        ("int8", 1, 1),
        ("int8", 100, 4),
        ("int4", 1, 1),
        ("int4", 100, 4),
        ("mixed", 1, 1),
        ("mixed", 100, 4),
    ],
)
def test_teams_of_blocks_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str | None, piece_bytes: int, share: int
) -> None:
    monkeypatch.setattr("teal.kernels.program.plan.MLP_PIECE_BYTES", piece_bytes)
    model = random_model(TINY, torch.float16, quant, False, False, "cpu")
    check_logits(emulated_backend(model, tmp_path, monkeypatch), 2e-3)
    assert f"MLP_SHARE = {share};" in (tmp_path / "config.cuh").read_text()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_families_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    quant = None if "tie_embeddings" in changes else "int4"
    model = random_model(replace(TINY, **changes), torch.bfloat16, quant, False, False, "cpu")
    check_logits(emulated_backend(model, tmp_path, monkeypatch), 1e-2)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
def test_a_warp_that_attends_to_many_tiles_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: float
) -> None:
    monkeypatch.setattr("teal.kernels.program.plan.MAX_ATTENTION_SPLITS", 1)
    config = replace(TINY, num_heads=3, num_kv_heads=1, sliding_windows=(None, 140))
    check_logits(emulated_backend(random_model(config, dtype, None, False, False, "cpu"), tmp_path, monkeypatch), limit)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("quant", [None, "int4"])
def test_blocks_that_own_many_columns_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str | None
) -> None:
    """Four blocks: the owners' columns are those of two warps each, and no block is idle."""
    monkeypatch.setattr("tests.kernels.emulated_program.FEW_BLOCKS", Device(4, 232448, (9, 0)))
    config = replace(TINY, hidden_size=1024)
    check_logits(
        emulated_backend(random_model(config, torch.float16, quant, False, False, "cpu"), tmp_path, monkeypatch), 2e-3
    )


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_clocks_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's clocks rise from phase to phase, and each phase has a block; times add up to those of a layer."""
    backend = emulated_backend(random_model(TINY, torch.float16, "int8", False, False, "cpu"), tmp_path, monkeypatch)
    backend.stamps = backend.new_stamps()
    with torch.inference_mode():
        backend.decode(
            torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), backend.model.new_cache(1, 8)
        )
    for clocks in backend.stamps.movedim(2, 1).flatten(0, 1):
        taken = clocks[clocks > 0].tolist()
        assert taken == sorted(taken) and clocks[0] > 0 and clocks[-1] > 0
    assert (backend.stamps > 0).any(dim=2).all(), "a phase without a block"
    times = phase_times(backend.stamps, 40.0)
    assert times.pop("a layer") == 40.0 and min(times.values()) > 0


@pytest.mark.gpu
def test_bits_of_a_thousand_steps() -> None:
    backend = CudaProgramBackend(
        FusedBackend(random_model(SMALL, torch.bfloat16, None, False, True, "cuda"), "test", False)
    )
    first = one_step(backend)
    assert all(torch.equal(one_step(backend), first) for _ in range(1000))


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("quant,lm_head", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
def test_formats(dtype: torch.dtype, limit: float, quant: str | None, lm_head: bool, sparse: bool) -> None:
    model = random_model(SMALL, dtype, quant, lm_head, sparse, "cuda")
    if sparse:
        ids = some_ids(model)
        modules = step_logits(EagerBackend(model, "test"), ids, PROMPT)[0]
        limit = ROUNDED_OTHERWISE * relative_error(modules, expected_logits(model, ids))
    check_on_gpu(model, limit)


@pytest.mark.gpu
@pytest.mark.parametrize("quant", [None, "int4", "int8"])
def test_a_head_of_4_bits(quant: str | None) -> None:
    check_on_gpu(use_int4_head(random_model(SMALL, torch.float16, quant, False, False, "cuda")), 2e-3)


@pytest.mark.gpu
def test_an_embedding_of_8_bits() -> None:
    check_on_gpu(use_int8_embedding(random_model(SMALL, torch.float16, "int4", False, False, "cuda")), 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_families(changes: dict[str, Any]) -> None:
    quant = None if "tie_embeddings" in changes else "int4"
    check_on_gpu(random_model(replace(TINY, **changes), torch.bfloat16, quant, False, False, "cuda"), 1e-2)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_graph_gives_the_same_tokens_and_sees_new_thresholds() -> None:
    model = random_model(SMALL, torch.bfloat16, "int4", True, True, "cuda")
    backend = CudaProgramBackend(FusedBackend(model, "test", compile=False))
    cache, token, position = model.new_cache(1, 256), *(torch.zeros(1, 1, dtype=torch.int64).cuda() for _ in range(2))

    def text(step: Any, count: int = 20) -> list[int]:
        token.fill_(5)
        position.zero_()
        return [step() or int(token) for _ in range(count)]

    def eager() -> None:
        backend.choose(token, position, cache)

    sparse = text(eager)
    graph = capture(eager, (token, position))
    assert text(graph.replay) == sparse
    sparsify(model, SparsityPlan({}, "test", 0.0, ({n: ProjectionPlan(0.0, 0.0) for n in PROJECTIONS},) * 3))
    dense = text(eager)
    assert text(graph.replay) == dense != sparse
