"""The decode program before it runs: what it refuses, how it is cut, and that it compiles."""

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from teal.decoding.backend import EagerBackend
from teal.decoding.cuda_program import CudaProgramBackend, model_obstacle
from teal.errors import UserError
from teal.kernels.formats.packing import Weight
from teal.kernels.program import compiler, launch
from teal.kernels.program.compiler import compile_source, compiler_obstacle
from teal.kernels.program.plan import MLP_RUN, UNEVEN, part_of, pieces_and_splits, plan, shape_obstacle, whole_runs
from teal.kernels.program.shapes import PRODUCTS, Device, Model
from teal.layers.quantized_linear import QuantConfig, round_in_two_terms, use_quantized_linears
from teal.model import ModelConfig, Transformer
from teal.parallel import Rank
from tests.kernels.program_models import (
    A100,
    H100,
    H200,
    LLAMA_1B,
    LLAMA_3_8B,
    MISTRAL_LARGE,
    QWEN_7B,
    RTX_4090,
    SMALL,
    described,
)

DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"


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
        ({"hidden_size": 9536}, H100, "products of these widths cannot be cut over 132 multiprocessors"),
        ({"vocab_size": 131072}, replace(H100, multiprocessors=4), "products of these widths cannot be cut over 4"),
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
        ("input groups", "widths are no multiples of 256 columns, as groups along the input need"),
        ("input groups of 8 bits", "8 bits with groups along the input are not supported; expected 4"),
        ("other floats", "torch.float32 in a model of torch.bfloat16 is not supported"),
        ("embedding", "an embedding of OutputHead is not supported"),
        ("dense", "weights are not in the kernels' layout"),
        ("capped", "it does not compute a soft cap of logits"),
    ],
)
def test_formats_that_are_refused(kind: str, message: str) -> None:
    config = replace(SMALL, num_layers=1, sliding_windows=(), logit_softcap=30.0 if kind == "capped" else None)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = Transformer(config).to(dtype).requires_grad_(False)
    mode, grouping = "int8" if kind.endswith("8 bits") else "int4", "input" if "input" in kind else "output"
    if kind != "dense":
        use_quantized_linears(model, QuantConfig(mode, 128, grouping=grouping))
    if kind == "embedding":
        model.embedding = model.lm_head  # type: ignore[assignment]
    if kind == "other floats":
        model.blocks[0].ffn_norm.float()
    if kind == "fp32":
        model.lm_head.to(torch.bfloat16)
    assert model_obstacle(model, H100) == message
    with pytest.raises(UserError, match="its kernel needs CUDA, and the model is on cpu"):
        CudaProgramBackend(EagerBackend(model, "test"))


def by_input(model: Model, channels: int) -> Model:
    """The same with so many channels to a scale."""
    qkv, o, gate_up, down = (replace(p, group=32, channels=channels) for p in model.products)
    return replace(model, products=(qkv, o, gate_up, down))


@pytest.mark.parametrize("channels,touched", [(128, 0), (64, 16), (32, 32)])
def test_groups_along_the_input_that_are_too_many(channels: int, touched: int) -> None:
    """Those of down, whose channels are a team's 1,024 columns of gate, where gate's and up's would be few enough."""
    model = by_input(described(LLAMA_3_8B, 4, 8), channels)
    told = f"a block's channels are of {touched} groups along the input; expected at most 8" if touched else ""
    assert shape_obstacle(model, H100) == told


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


@pytest.mark.parametrize("longest,shortest", [(MLP_RUN, 4), (8, 1)])
@pytest.mark.parametrize("count,parts", [(4096, 11), (4096, 4), (576, 4), (896, 12), (96, 5), (8016, 132), (17, 3)])
def test_parts_have_whole_runs_and_are_about_even(count: int, parts: int, longest: int, shortest: int) -> None:
    run, most = whole_runs(count, parts, longest, shortest)
    of_part = [0] * parts
    for i in range(count):
        of_part[i // run % parts] += 1
    assert max(of_part) <= most == run * math.ceil(count / run / parts)
    assert run == shortest or most <= (1 + UNEVEN) * count / parts
    longer = 2 * run
    assert longer > longest or longer * math.ceil(count / longer / parts) > (1 + UNEVEN) * count / parts


@pytest.mark.parametrize("bits,blocks", [(4, {H100: 112, H200: 128}), (8, {H100: 128, H200: 128})])
def test_fast_memory_keeps_more_blocks_busy(bits: int, blocks: dict[Device, int]) -> None:
    for device, count in blocks.items():
        sizes = plan(described(LLAMA_3_8B, bits, 8), device).sizes
        assert sizes["MLP_TEAMS"] * sizes["MLP_SHARE"] == count


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


def check_cubin(model: Model, device: Device, folder: Path) -> None:
    """The plan's source compiles, within the plan's shared memory, to what GPUs take."""
    found = plan(model, device)
    assert found.shared_bytes <= device.shared_bytes
    cubin = compile_source(found.source, f"sm_{device.capability[0]}{device.capability[1]}")
    assert b"decode_step" in cubin
    if DISASSEMBLER.exists():
        (folder / "cubin").write_bytes(cubin)
        run = subprocess.run([DISASSEMBLER, "-c", folder / "cubin"], capture_output=True, text=True, check=True)
        odd = re.findall(r".*desc\[UR\d*[13579]\].*", run.stdout)
        assert "LDGSTS" in run.stdout and not odd, f"a GPU refuses {odd[:1]}, a descriptor in an odd register"


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
@pytest.mark.parametrize("device", [A100, RTX_4090, H200], ids=["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize(
    "bits,head_bits,ranks", [(4, 8, 1), (8, 16, 1), (16, 16, 1), (4, 4, 1), (8, 4, 1), (16, 16, 2)]
)
def test_it_compiles_without_a_gpu(device: Device, bits: int, head_bits: int, ranks: int, tmp_path: Path) -> None:
    part = described(Rank(0, ranks).config(LLAMA_3_8B), bits, head_bits)
    check_cubin(replace(part, ranks=ranks), device, tmp_path)


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
@pytest.mark.parametrize("bits,head_bits", [(4, 8), (8, 16)])
def test_the_widest_compile_without_a_gpu(bits: int, head_bits: int, tmp_path: Path) -> None:
    """Of 12,288 channels no thread lists more than a mask has bits."""
    check_cubin(described(MISTRAL_LARGE, bits, head_bits), H200, tmp_path)


@pytest.mark.parametrize("device", [H100, A100, replace(H100, multiprocessors=78)], ids=["H100", "A100", "H20"])
def test_pieces_are_all_of_a_row(device: Device) -> None:
    """Or the plan refuses: a row's rest would be nobody's, and its owners would wait for ever."""
    refused = 0
    for hidden in range(2048, 16384 + 1, 32):
        model = described(replace(SMALL, hidden_size=hidden, num_heads=32, num_kv_heads=8), 4, 8)
        if shape_obstacle(model, device):
            refused += 1
        else:
            assert model.products[1].granules % plan(model, device).sizes["O_PIECE"] == 0, hidden
    assert 0 < refused < 250


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
@pytest.mark.parametrize("device", [RTX_4090, H100], ids=["sm_89", "sm_90"])
@pytest.mark.parametrize("kind", ["mixed", "input"])
def test_other_groups_compile_without_a_gpu(device: Device, kind: str, tmp_path: Path) -> None:
    model = described(LLAMA_3_8B, 4, 4)
    channels = torch.arange(0, 4096, 16, dtype=torch.int32)
    refined = replace(model, refined=((channels,),) * len(PRODUCTS))
    check_cubin(refined if kind == "mixed" else by_input(model, 128), device, tmp_path)


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
def test_what_is_compiled_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_once(config: str, architecture: str) -> bytes:
        compiled.append(architecture)
        return b"a cubin"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_source", compile_once)
    for _ in range(2):
        assert compiler.cubin("config", (9, 0)) == b"a cubin"
    assert compiled == ["sm_90"]
    [path] = tmp_path.rglob("*.cubin")
    for damaged in (b"", path.read_bytes()[:-1]):
        path.write_bytes(damaged)
        for _ in range(2):
            assert compiler.cubin("config", (9, 0)) == b"a cubin"
    assert len(compiled) == 3
    path.unlink()
    path.mkdir()  # what cannot be read or written is compiled each time
    assert compiler.cubin("config", (9, 0)) == b"a cubin" and len(compiled) == 4


@pytest.mark.skipif(bool(compiler_obstacle()), reason="no NVRTC")
def test_a_failed_compilation_says_where() -> None:
    with pytest.raises(UserError, match=r"compiling program.cu for sm_90 failed: .*error"):
        compile_source("#error no config", "sm_90")
