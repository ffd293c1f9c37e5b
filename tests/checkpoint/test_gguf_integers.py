"""Folders converted from GGUF: floats for whoever asks, integers for a CPU's model, groups for a GPU's."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from teal.calibration.thresholds import calibrate
from teal.checkpoint import weights
from teal.checkpoint.blocks import Shard, fits_half, open_file, save_shard
from teal.checkpoint.gguf import convert_gguf
from teal.checkpoint.identity import weights_identity
from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.weights import load_model, open_shard
from teal.errors import UserError
from teal.kernels.formats.blocks import Blocks, dequantize, sections
from teal.layers import block_linear
from teal.layers.block_linear import BlockHead, BlockLinear, BlockWeight, widen_blocks
from teal.layers.quantized_linear import QuantizedLinear
from teal.layers.rounding import quantize
from teal.model import OutputHead, Transformer
from teal.options import METHODS, ModelOptions, Settings
from tests.block_models import random_blocks
from tests.conftest import assert_near, float_tensors, link_files, save_tiny_model, tiny_config
from tests.gguf_files import CPU, SIZES, byte_level_vocabulary, write_gguf

Convert = Callable[[Type], Path]


@pytest.fixture
def convert(tmp_path: Path, byte_level_tokenizer_json: str) -> Convert:
    """Makes the folder of a tiny Llama whose GGUF file is of this type."""
    model: transformers.PreTrainedModel = save_tiny_model(
        tiny_config("llama", vocab_size=300, **SIZES), tmp_path / "hf"
    )

    def made(kind: Type) -> Path:
        path, folder = tmp_path / f"{kind.name}.gguf", tmp_path / kind.name
        write_gguf(path, model, kind, byte_level_vocabulary(byte_level_tokenizer_json))
        folder.mkdir()
        convert_gguf(path, folder)
        return folder

    return made


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    tokens = torch.arange(40)[None] * 7 % 290
    return model(tokens, torch.arange(40)[None], model.new_cache(1, 40))


def kinds(model: Transformer) -> set[type]:
    return {type(block.get_submodule(p.module)) for block in model.blocks for p in block.projections()}


def test_floats_are_read_and_named_as_those_of_any_folder(convert: Convert, tmp_path: Path) -> None:
    folder = convert(Type.Q4_1)
    plain = link_files(folder, tmp_path / "plain", "*.safetensors")
    tensors = float_tensors(folder)
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float16
    assert weights_identity(folder) == weights_identity(plain)
    assert torch.equal(logits(load_model(folder, CPU, torch.float32)), logits(load_model(plain, CPU, torch.float32)))
    with open_shard(folder / "model.safetensors") as shard:
        part = shard.get_slice("lm_head.weight")
        assert (part.get_dtype(), part.get_shape()) == ("F16", [300, 256])
        assert torch.equal(part[7:9], tensors["lm_head.weight"][7:9])


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0], ids=lambda kind: kind.name)
def test_groups_where_a_device_has_no_kernels_for_blocks(
    kind: Type, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder = convert(kind)
    expected = logits(load_model(folder, CPU, torch.float32, keep_integers=True))
    monkeypatch.setattr(weights, "BLOCK_DEVICES", ())
    model = load_model(folder, CPU, torch.float32, keep_integers=True)
    assert kinds(model) == {QuantizedLinear} and type(model.lm_head) is OutputHead
    assert_near("logits", logits(model), expected, 3e-3)  # head and embedding are fp16


def test_other_types_are_floats_there(convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_DEVICES", ())
    assert kinds(load_model(convert(Type.Q4_1), CPU, torch.float32, keep_integers=True)) == {torch.nn.Linear}


@pytest.mark.parametrize("options,expected", [
    ({}, BlockLinear), ({"backend": "eager"}, BlockLinear), ({"dequantize": True}, torch.nn.Linear),
    ({"compile": True}, torch.nn.Linear), ({"quant": "int8"}, QuantizedLinear),
], ids=str)  # fmt: skip
def test_options_that_make_floats(options: dict[str, object], expected: type, convert: Convert) -> None:
    folder = convert(Type.Q5_0)
    loaded = load_for_decoding(ModelOptions(str(folder), device="cpu", dtype="fp32", **options))  # type: ignore[arg-type]
    assert kinds(loaded.model) == {expected}
    assert (type(loaded.model.lm_head) is BlockHead) == (expected is BlockLinear)


def test_blocks_in_memory_can_be_rounded(convert: Convert) -> None:
    folder = convert(Type.Q4_K)
    model = load_model(folder, CPU, torch.float32, keep_integers=True)
    before = logits(model)
    plain = load_model(folder, CPU, torch.float32, keep_integers=True)
    widen_blocks(plain)
    assert kinds(plain) == {torch.nn.Linear} and type(plain.lm_head) is OutputHead
    assert_near("logits of floats", logits(plain), before, 1e-5)
    assert kinds(quantize(model, "int8", 32)) == {QuantizedLinear}
    assert_near("logits of 8 bits", logits(model), before, 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_calibration_takes_blocks(method: str, convert: Convert) -> None:
    """The plan is that of the floats that they stand for."""
    folder, tokens = convert(Type.Q8_0), torch.randint(5, 290, (4, 64), generator=torch.Generator().manual_seed(1))
    models = [load_model(folder, CPU, torch.float32, keep_integers=True) for _ in range(2)]
    widen_blocks(models[1])
    plans = [calibrate(model, tokens, Settings((0.5,), method), {})[0] for model in models]
    found, expected = ([[p.threshold for p in layer.values()] for layer in plan.layers] for plan in plans)
    assert_near("thresholds", torch.tensor(found), torch.tensor(expected), 1e-3)


def test_floats_are_kept_while_many_passes_need_them(convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(convert(Type.Q4_1), CPU, torch.float32, keep_integers=True)
    made: list[int] = []
    original = block_linear.block_floats

    def counted(parts: list[Blocks], dtype: torch.dtype) -> torch.Tensor:
        made.append(1)
        return original(parts, dtype)

    monkeypatch.setattr(block_linear, "block_floats", counted)
    tokens = torch.arange(64)[None]
    alone = [model(tokens, tokens, model.new_cache(1, 64)) for _ in range(2)]
    assert not made, "without the context only tiles are"
    weights = [module for module in model.modules() if isinstance(module, block_linear.BlockWeight)]
    with block_linear.floats_kept(model):
        kept = [model(tokens, tokens, model.new_cache(1, 64)) for _ in range(2)]
        assert len(made) == len(weights) - 1 > 0  # the embedding reads columns
        calibrate(model, tokens, Settings((0.5,), "global"), {})  # gradients pass what was kept
    assert_near("logits", kept[0], alone[0], 1e-6)
    assert torch.equal(kept[0], kept[1])
    assert all(weight.kept is None for weight in weights)


@pytest.mark.parametrize("record", [
    "no json", "[]", '{"lm_head.weight": ["Q4_1", 256]}', '{"lm_head.weight": ["Q3_K", 256, 300]}',
    '{"lm_head.weight": ["Q4_1", 256, 385]}', '{"lm_head.weight": ["Q4_1", -256, 300]}',
    '{"nowhere.weight": ["Q4_1", 256, 300]}', '{"model.norm.weight": ["Q4_1", 256, 300]}',
])  # fmt: skip
def test_a_damaged_record_is_refused(record: str, convert: Convert) -> None:
    path = convert(Type.Q4_1) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, path, {"format": "pt", "blocks": record})
    with pytest.raises(UserError, match="its record of blocks is damaged") as error:
        load_model(path.parent, CPU, torch.float32, keep_integers=True)
    assert "\n" not in str(error.value)


def block_bytes(model: Transformer) -> list[torch.Tensor]:
    modules = [module for module in model.modules() if isinstance(module, BlockWeight)]
    return [data for module in modules for data in module.data]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("length", range(0, 64, 9))
def test_weights_are_used_as_mapped(length: int, tmp_path: Path, convert: Convert) -> None:
    """Whatever the length of a header, all begin at whole cache lines, and none is copied."""
    folder = convert(Type.Q4_1)
    path, longer = folder / "model.safetensors", tmp_path / "longer.safetensors"
    with open_file(path) as file:
        shard = Shard(file, path, {})
        tensors = {name: shard.stored(name) for name in shard.keys()}  # noqa: SIM118 - no dict
        save_shard(tensors | {"x" * (length + 1): torch.ones(16)}, longer)
    with open_file(longer) as file:
        blocks = [file.get_tensor(name) for name, tensor in tensors.items() if isinstance(tensor, Blocks)]
    assert blocks and all(data.data_ptr() % 64 == 0 for data in blocks)
    model = load_model(folder, CPU, torch.float32, keep_integers=True)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    maps = [[int(address, 16) for address in line[0].split("-")] for line in lines]
    assert all(any(begin <= data.data_ptr() < end for begin, end in maps) for data in block_bytes(model))


def test_weights_that_begin_elsewhere_are_copied(convert: Convert) -> None:
    folder = convert(Type.Q4_1)
    mapped, path = load_model(folder, CPU, torch.float32, keep_integers=True), folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, record = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["blocks"]  # noqa: SIM118
    for spaces in range(0, 64, 8):
        save_file(tensors, folder / "new", {"format": "pt", "blocks": record, "padding": " " * spaces})
        os.replace(folder / "new", path)
        model = load_model(folder, CPU, torch.float32, keep_integers=True)
        assert all(data.data_ptr() % 64 == 0 for data in block_bytes(model))
        assert torch.equal(logits(model), logits(mapped))


def test_no_float_copy_is_stored(convert: Convert) -> None:
    path = convert(Type.Q8_0) / "model.safetensors"
    with safe_open(path, framework="pt") as tensors:
        dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no dict
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {"U8"}


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K"])
def test_what_fits_fp16(kind: str) -> None:
    weight = random_blocks(kind, 256, 64)
    assert fits_half(weight) and dequantize(weight).half().isfinite().all()
    for value in (60000.0, float("nan")):
        large = Blocks(*weight[:3], weight.data.clone())
        of_super = sections(large)[3]
        (of_super if of_super.numel() else sections(large)[1])[0, 0] = value
        assert not fits_half(large)
