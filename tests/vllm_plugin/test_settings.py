"""What the entry "teal" of a config.json asks for, and which plans it may have. vLLM is not needed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import load_for_decoding
from teal.checkpoint.weights import stored_config
from teal.errors import UserError
from teal.options import ModelOptions
from teal.plan import plan_name
from teal.vllm_plugin.places import Place, find_place
from teal.vllm_plugin.settings import PluginSettings, architecture, find_plan
from tests.conftest import QUANTIZABLE, link_files, run_command, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def planned(quantizable_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a plan for 50% beside it."""
    folder = link_files(quantizable_folder, tmp_path_factory.mktemp("planned"))
    loaded = load_for_decoding(ModelOptions(str(folder), device="cpu", dtype="fp32"), sparse=True)
    choose_plan(loaded, 0.5, None).save(folder / plan_name(0.5))
    return folder


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "teal [] is not usable; expected an object of sparsity, plan, force_plan, prompts"),
        ({"sparsty": 0.5}, "teal: 'sparsty' is unknown; expected sparsity, plan, force_plan, prompts"),
        ({"sparsity": 1}, "teal: sparsity 1 is out of range; expected 0 <= sparsity < 1"),
        ({"sparsity": "0.5"}, "teal: sparsity '0.5' is out of range"),
        ({"plan": 3}, "teal: plan 3 is not usable; expected a file name"),
        ({"force_plan": 1}, "teal: force_plan 1 is not usable; expected true or false"),
        ({"prompts": "no"}, "teal: prompts 'no' is not usable; expected dense or sparse"),
        ({"plan": "a", "sparsity": 0.5}, "teal: plan and sparsity are both given; expected one of them"),
    ],
)
def test_mistakes_are_named(entry: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        PluginSettings.from_json(entry)
    assert str(error.value).startswith(message)


def test_no_entry_is_dense(planned: Path) -> None:
    assert find_plan(PluginSettings.from_json(None), str(planned), stored_config(planned)) is None


def test_a_plan_lies_beside_the_checkpoint_or_is_named(planned: Path, quantizable_folder: Path) -> None:
    config = stored_config(planned)
    beside = find_plan(PluginSettings(sparsity=0.5), str(planned), config)
    named = find_plan(PluginSettings(plan=str(planned / plan_name(0.5))), str(quantizable_folder), config)
    assert beside is not None and beside == named and beside.target == 0.5
    with pytest.raises(UserError, match=r"there is no teal-0\.4\.json in .*; calibrate\.py writes plans"):
        find_plan(PluginSettings(sparsity=0.4), str(planned), config)
    with pytest.raises(UserError, match=r"some/name is no folder; calibrate\.py writes plans"):
        find_plan(PluginSettings(sparsity=0.4), "some/name", config)
    with pytest.raises(UserError, match="plan nowhere: not readable"):
        find_plan(PluginSettings(plan="nowhere"), str(planned), config)


def test_a_plan_for_another_model_or_other_weights_is_refused(planned: Path, tiny_folder: Path, tmp_path: Path) -> None:
    plan = str(planned / plan_name(0.5))
    with pytest.raises(UserError, match="plan is for another model: vocab_size 320"):
        find_plan(PluginSettings(plan=plan), str(tiny_folder), stored_config(tiny_folder))
    other = shutil.copytree(planned, tmp_path / "other")
    save_tiny_model(tiny_config("qwen2", **json.loads((planned / "config.json").read_text())), other)
    tensors = other / "model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-4000:] = bytes(4000)
    tensors.write_bytes(content)
    with pytest.raises(UserError, match='or use it all the same with "force_plan": true'):
        find_plan(PluginSettings(plan=plan), str(other), stored_config(other))
    assert find_plan(PluginSettings(plan=plan, force_plan=True), str(other), stored_config(other)) is not None


def test_models_of_the_hub_are_known_by_their_config(planned: Path) -> None:
    raw = json.loads((planned / "config.json").read_text())
    assert architecture("some/name", raw) == architecture(str(planned), raw)
    with pytest.raises(UserError, match="mamba"):
        architecture("some/name", raw | {"model_type": "mamba"})


def test_blocks_of_a_gguf_file_are_refused(default_folder: Path) -> None:
    with pytest.raises(UserError, match="holds the blocks of a GGUF file, which vLLM does not read"):
        architecture(str(default_folder), {})


def test_folders_in_our_own_form_are_refused(tmp_path: Path) -> None:
    """Of a Gemma whose norms have their offset added, say: vLLM would add it again."""
    save_tiny_model(tiny_config("gemma2", head_dim=32, **QUANTIZABLE), tmp_path / "gemma")
    done = run_command("-m", "quantize", "--checkpoint", tmp_path / "gemma", "--mode", "int8", "-o", tmp_path / "int8")
    assert done.returncode == 0, done.stderr
    raw = json.loads((tmp_path / "int8" / "config.json").read_text())
    with pytest.raises(UserError, match="this gemma2 model was rotated or rounded into a form that vLLM"):
        architecture(str(tmp_path / "int8"), raw)
    assert architecture(str(tmp_path / "gemma"), json.loads((tmp_path / "gemma" / "config.json").read_text()))


def test_layers_are_found_by_name(planned: Path) -> None:
    config = stored_config(planned)
    assert find_place(config, "model.layers.2.self_attn.qkv_proj") == Place(2, 0, ("q", "k", "v"))
    assert find_place(config, "language_model.model.layers.0.mlp.gate_up_proj") == Place(0, 2, ("gate", "up"))
    assert find_place(config, "model.layers.1.self_attn.v_proj") == Place(1, 0, ("v",))
    assert find_place(config, "model.layers.1.mlp.down_proj") == Place(1, 3, ("down",))
    assert find_place(config, "vision_tower.encoder.layers.1.mlp.down_proj") is None
    assert find_place(config, "multi_modal_projector.linear") is None
    for name in ("model.layers.1.mixer.in_proj", "model.layers.3.mlp.down_proj"):
        with pytest.raises(UserError, match=rf"layer {name} is not supported by teal; expected one of self_attn"):
            find_place(config, name)
