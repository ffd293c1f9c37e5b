"""The decode program computes what the model says: emulated on a CPU, and on a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teal.bench.steps import phase_times
from teal.decoding.backend import EagerBackend
from teal.decoding.backends import FusedBackend
from teal.decoding.compilation import capture
from teal.decoding.cuda_program import CudaProgramBackend
from teal.kernels.program.plan import MAX_STAGES
from teal.kernels.program.shapes import Device
from teal.layers.quantized_embedding import QuantizedEmbedding
from teal.model import Transformer
from teal.plan import ProjectionPlan, SparsityPlan
from teal.teal_layers import sparsify
from tests.conftest import PROJECTIONS, relative_error
from tests.kernels.emulated_program import COMPILER, emulated_backend
from tests.kernels.program_models import (
    FAMILIES,
    PROMPT,
    SMALL,
    TINY,
    WIDE,
    check_logits,
    check_on_gpu,
    expected_logits,
    one_step,
    prepared,
    program_logits,
    random_dense,
    random_model,
    some_ids,
    use_int4_head,
)
from tests.token_logits import step_logits

FORMATS = {
    "floats": (None, False), "int8": ("int8", True), "int4": ("int4", False), "int4-head": ("int4", True),
    "mixed": ("mixed", False), "mixed-head": ("mixed", True),
}  # fmt: skip
SEEDS = {None: 0, "int8": 1, "int4": 6, "mixed": 1}  # with which no entry is at its threshold but for rounding
# Rounding carries entries over their thresholds: modules in 16 bits are 0.06 to 0.16 from the reference. The
# program may be so many times as far. A wrong threshold gives 0.3 and more.
ROUNDED_OTHERWISE = 1.5


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("quant,lm_head", FORMATS.values(), ids=FORMATS)
def test_formats_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str | None, lm_head: bool) -> None:
    model = random_model(TINY, torch.float16, quant, lm_head, True, "cpu", SEEDS[quant])
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
@pytest.mark.parametrize(
    "group,lm_head,sparse,scaled,share,dtype",
    [
        (64, False, True, True, 4, torch.float16),  # the last of two teams has a quarter
        (128, False, False, True, 1, torch.bfloat16),
        (64, True, False, False, 4, torch.float16),
    ],
    ids=["sparse", "teams of one", "without a panel"],
)
def test_groups_along_the_input_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, lm_head: bool, sparse: bool, scaled: bool, share: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    if share == 1:
        monkeypatch.setattr("teal.kernels.program.plan.MLP_PIECE_BYTES", 1)
    if not scaled:
        monkeypatch.setattr("teal.kernels.program.plan.MIN_SCALED_STAGES", MAX_STAGES + 1)
    dense = random_dense(WIDE, seed=4).to(dtype)  # with which no entry is at its threshold but for rounding
    backend = emulated_backend(prepared(dense, "int4-input", lm_head, sparse, group), tmp_path, monkeypatch)
    check_logits(backend, 2e-3 if dtype == torch.float16 else 1e-2)
    config = (tmp_path / "config.cuh").read_text()
    assert f"SCALED = {str(scaled).lower()};" in config and f"MLP_SHARE = {share};" in config


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_teams_of_eight_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team of four would have channels of more groups along the input than there are columns for."""
    monkeypatch.setattr("tests.kernels.emulated_program.FEW_BLOCKS", Device(18, 232448, (9, 0)))
    dense = random_dense(replace(WIDE, hidden_size=2560, num_layers=1, sliding_windows=())).to(torch.float16)
    check_logits(emulated_backend(prepared(dense, "int4-input", False, False, 64), tmp_path, monkeypatch), 2e-3)
    assert "MLP_SHARE = 8;" in (tmp_path / "config.cuh").read_text()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("gb_per_s,granules", [(0.0, 12), (1000.0, 10)], ids=["slow memory", "fast memory"])
def test_finer_runs_of_columns_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gb_per_s: float, granules: int
) -> None:
    monkeypatch.setattr("tests.kernels.emulated_program.FEW_BLOCKS", Device(10, 232448, (9, 0), gb_per_s))
    model = random_model(WIDE, torch.float16, "int4", True, False, "cpu")
    check_logits(emulated_backend(model, tmp_path, monkeypatch), 2e-3)
    assert f"TEAM_GRANULES = {granules};" in (tmp_path / "config.cuh").read_text()


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
def test_pieces_of_six_groups_and_a_half_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They touch eight groups, and begin at any: their scales do not come 16 bytes at a time."""
    monkeypatch.setattr("tests.kernels.emulated_program.FEW_BLOCKS", Device(8, 232448, (9, 0)))
    model = prepared(random_dense(replace(TINY, hidden_size=3328)).half(), "int8", False, False, 64)
    backend = emulated_backend(model, tmp_path, monkeypatch)
    assert backend.program.plan.sizes["O_PIECE"] == 26
    check_logits(backend, 2e-3)


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
@pytest.mark.parametrize("group", [64, 128])
def test_groups_along_the_input(group: int) -> None:
    check_on_gpu(prepared(random_dense(WIDE).to("cuda", torch.float16), "int4-input", False, False, group), 2e-3)


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
