"""`--adapter`: the model is the checkpoint's with the adapter merged, under a name and an identity of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

from teal.bench import decode
from teal.checkpoint.blocks import open_file
from teal.checkpoint.loading import describe, load_for_decoding
from teal.checkpoint.rotation import RECORD, VERSION
from teal.checkpoint.source import DEFAULT_FOLDER, name_for_people, resolve_checkpoint
from teal.cli import calibrate, evaluate, generate, quantize, serve
from teal.errors import UserError
from teal.layers.block_linear import BlockHead, BlockLinear
from teal.model import Transformer
from teal.options import ModelOptions
from tests.checkpoint.test_adapter import ALPHA, RANK, adapter_of, logits
from tests.conftest import QUANTIZABLE, assert_near, assert_one_line_error, save_tiny_model, tiny_config
from tests.gguf_files import SIZES, byte_level_vocabulary, write_gguf

Call = Callable[..., tuple[int, str, str]]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}
FAST = ("--device", "cpu", "--dtype", "fp32")
SCALE = ALPHA / RANK
PROMPT = ("--prompt", "The", "--max-new-tokens", "8", "--ignore-eos", "--json")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def base(quantizable_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantizable_folder, tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """One that names a base model which is nowhere: the checkpoint's option says which it is."""
    folder = tmp_path / "lora"
    adapter_of(base, folder, ("v_proj.weight", "down_proj.weight"), base_model_name_or_path="/nowhere/at/all")
    return folder


def loaded(base: Path, adapter: Path | None) -> Any:
    return load_for_decoding(ModelOptions(str(base), adapter=None if adapter is None else str(adapter), **OPTIONS))


def test_the_library_merges_it(base: Path, adapter: Path) -> None:
    plain, adapted = loaded(base, None), loaded(base, adapter)
    name = "model.layers.1.mlp.down_proj"
    pair = load_file(adapter / "adapter_model.safetensors")
    b, a = (pair[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    wanted = plain.model.layers[1].feed_forward.down.weight + SCALE * b @ a
    assert_near(name, adapted.model.layers[1].feed_forward.down.weight, wanted, 1e-6)
    assert torch.equal(adapted.model.layers[1].attention.wo.weight, plain.model.layers[1].attention.wo.weight)
    assert adapted.identity != plain.identity and adapted.weights.identity != plain.weights.identity
    assert (plain.name, adapted.name, adapted.weights.name) == (str(base), "base+lora", "base+lora")


def test_the_api_calls_it_by_both_names(base: Path, adapter: Path) -> None:
    """No path of the server's is told, and the default model's name stays that model's."""
    for checkpoint, name in ((str(base), "base+lora"), (None, f"{DEFAULT_FOLDER}+lora")):
        args = serve.build_parser().parse_args(["--adapter", str(adapter)])
        args.checkpoint = checkpoint
        engine: Any = SimpleNamespace(name=name_for_people(Path("merged"), checkpoint, str(adapter)))
        assert serve.model_names(args, engine) == (name,)


def test_a_plan_of_the_base_is_refused(base: Path, adapter: Path, call_main: Call, tmp_path: Path) -> None:
    """Neither found beside it nor taken when named; the adapted model's own is."""
    size = ("--sparsity", "0.5", "--sequences", "2", "--length", "64")
    assert call_main(calibrate.main, "--checkpoint", base, *FAST, *size)[0] == 0
    run = ("--checkpoint", base, "--adapter", adapter, *FAST, *PROMPT)
    assert not list(resolve_checkpoint(str(base), str(adapter)).glob("teal-*.json"))
    code, _, err = call_main(generate.main, *run, "--plan", base / "teal-0.5.json")
    assert_one_line_error(code, err, "made for base", "not for base+lora", "--force-plan")
    arguments = ("--checkpoint", base, "--adapter", adapter, *FAST, *size, "-o", tmp_path)
    code, out, err = call_main(calibrate.main, *arguments)
    assert code == 0 and out.split() == [str(tmp_path / "base+lora-teal-0.5.json")], err
    code, out, err = call_main(generate.main, *run, "--plan", out.strip())
    assert code == 0, err


def test_rotated_with_its_adapter(base: Path, adapter: Path, call_main: Call, tmp_path: Path) -> None:
    size = ("--sparsity", "0.5", "--sequences", "3", "--length", "32", "--rotate", tmp_path / "turned")
    code, _, err = call_main(calibrate.main, "--checkpoint", base, "--adapter", adapter, *FAST, *size)
    assert code == 0, err
    turned, adapted = loaded(tmp_path / "turned", None).model, loaded(base, adapter).model
    assert_near("logits", logits(turned), logits(adapted), 1e-5)
    code, _, err = call_main(generate.main, "--checkpoint", tmp_path / "turned", "--adapter", adapter, *FAST, *PROMPT)
    assert_one_line_error(code, err, "is rotated; merge the adapter into the original model")


def test_commands_take_it(base: Path, adapter: Path, call_main: Call, tmp_path: Path) -> None:
    both = ("--checkpoint", base, "--adapter", adapter)
    merged = resolve_checkpoint(str(base), str(adapter))

    def text(*model: object) -> str:
        code, out, err = call_main(generate.main, *model, *FAST, *PROMPT)
        assert code == 0, err
        return json.loads(out)["text"]

    assert text(*both) == text("--checkpoint", merged) != text("--checkpoint", base)
    code, _, err = call_main(quantize.main, *both, "--mode", "int8", "-o", tmp_path / "out")
    assert code == 0, err
    assert text("--checkpoint", tmp_path / "out") == text("--checkpoint", merged, "--quant", "int8")
    code, _, err = call_main(quantize.main, *both, "--mode", "int8", "-o", adapter / "out")
    assert_one_line_error(code, err, "--output", "lies in the adapter")
    measured = ("--reference", base, "--tokens", "64", "--sparsity", "0", "--json")
    code, out, err = call_main(evaluate.main, *both, *FAST, *measured)
    assert code == 0, err
    assert json.loads(out)["rows"][0]["kl"] > 0.01  # the reference has no adapter
    code, _, err = call_main(generate.main, "--checkpoint", tmp_path / "out", "--adapter", adapter, *FAST, *PROMPT)
    assert_one_line_error(code, err, "is quantized; an adapter is merged into the original weights")


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.F16], ids=lambda kind: kind.name)
def test_a_gguf_file(kind: Type, tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    """What it changes becomes floats; all else stays integers."""
    hf_model: Any = save_tiny_model(tiny_config("llama", vocab_size=300, **SIZES), tmp_path / "hf")
    file, folder = tmp_path / "m.gguf", tmp_path / "lora"
    write_gguf(file, hf_model, kind, byte_level_vocabulary(byte_level_tokenizer_json))
    added = adapter_of(tmp_path / "hf", folder, ("q_proj.weight",))
    floats = load_for_decoding(ModelOptions(str(file), dequantize=True, **OPTIONS)).model
    adapted = loaded(file, folder).model
    q = added["model.layers.0.self_attn.q_proj.weight"].shape[0]
    with torch.inference_mode():
        for i, block in enumerate(floats.blocks):
            block.attention.wqkv.weight[:q] += SCALE * added[f"model.layers.{i}.self_attn.q_proj.weight"]
    assert_near("logits", logits(adapted), logits(floats), 5e-3)  # the sum is rounded to fp16
    if kind == Type.Q4_0:
        check_integers(adapted, resolve_checkpoint(str(file), str(folder)))


def check_integers(model: Transformer, folder: Path) -> None:
    with open_file(folder / "model.safetensors") as tensors:
        stored = {part: tensors.get_slice(f"model.layers.0.self_attn.{part}_proj.weight").get_dtype() for part in "qk"}
    assert stored == {"q": "F16", "k": "U8"}
    feed_forward = model.blocks[0].feed_forward
    if not isinstance(feed_forward.gate_up, torch.nn.Linear):  # this machine has compiled kernels
        assert isinstance(feed_forward.down, BlockLinear) and isinstance(model.lm_head, BlockHead)
        assert not isinstance(model.blocks[0].attention.wqkv, BlockLinear)


@pytest.mark.parametrize(
    "family,overrides,said",
    [
        ("llama", {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3}, "does not fit"),
        ("phi3", QUANTIZABLE, "v_proj.weight is no weight of"),
    ],
    ids=["other shapes", "other names"],
)
def test_an_adapter_of_another_model(
    family: str, overrides: dict[str, Any], said: str, adapter: Path, tmp_path: Path
) -> None:  # fmt: skip
    save_tiny_model(tiny_config(family, **overrides), tmp_path / "other")
    with pytest.raises(UserError, match=said) as raised:
        describe(str(tmp_path / "other"), adapter=str(adapter))
    assert "\n" not in str(raised.value) and str(adapter) in str(raised.value)


def test_a_rotated_base_says_so(base: Path, adapter: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {RECORD: {"version": VERSION}}))
    with pytest.raises(UserError, match="is rotated"):
        describe(str(base), adapter=str(adapter))


@pytest.mark.parametrize("main", [generate.main, serve.main, evaluate.main, calibrate.main, quantize.main, decode.main])
@pytest.mark.parametrize(
    "given,said",
    [("NOWHERE", "no such folder; give a LoRA adapter's folder"), ("BASE", "holds no adapter_config.json")],
)
def test_what_is_no_adapter(
    main: Callable[[], None], given: str, said: str, base: Path, tmp_path: Path, call_main: Call
) -> None:
    name = str(base if given == "BASE" else tmp_path / "nowhere")
    own = {
        generate.main: ("--prompt", "a"),
        calibrate.main: ("--sparsity", "0.5"),
        quantize.main: ("--mode", "int8", "-o", tmp_path / "out"),
    }
    code, _, err = call_main(main, "--checkpoint", base, "--adapter", name, *own.get(main, ()))
    assert_one_line_error(code, err, f"--adapter {name}: {said}")
