"""sparsify of transformers.py: a model of transformers drops what our own drops, prompt by prompt and step by step."""

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from teal.checkpoint.config import load_config
from teal.checkpoint.weights import load_model
from teal.errors import UserError
from teal.evaluation.quality import continue_greedily
from teal.model import Transformer
from teal.plan import ProjectionPlan, SparsityPlan, config_fields, even_plan, keep_all_plan
from teal.teal_layers import SparseLinear, sparse_layers, sparse_prefill
from teal.teal_layers import sparsify as sparsify_ours
from teal.transformers import TransformersLinear, achieved_sparsity, set_counting, sparsify
from tests.checkpoint.test_families import FAMILIES
from tests.conftest import PROJECTIONS, ROOT, assert_near, relative_error, save_tiny_model, tiny_config

CPU = torch.device("cpu")
TOKENS = torch.arange(20)[None] * 7 % 190 + 5
STEPS = 16
THRESHOLDS = {"q": 0.2, "k": 0.6, "v": 0.4, "o": 0.1, "gate": 0.3, "up": 0.7, "down": 0.05}
TEXT_FAMILIES = ["llama-attention-bias", "qwen2", "gemma2", "granite", "phi3", "glm4", "stablelm2"]


@pytest.fixture
def hf_model(tmp_path: Path) -> Any:
    """A tiny Qwen2, which has biases, saved in tmp_path."""
    return save_tiny_model(tiny_config("qwen2"), tmp_path)


def plan_with(folder: Path, thresholds: dict[str, float]) -> SparsityPlan:
    config = load_config(folder)
    layer = {name: ProjectionPlan(0.5, thresholds.get(name, 0.0)) for name in PROJECTIONS}
    return SparsityPlan(config_fields(config), "test", 0.5, (layer,) * config.num_layers)


@torch.inference_mode()
def our_logits(model: Transformer) -> Tensor:
    """Logits [T, V] of TOKENS, all of them sparse."""
    positions = torch.arange(TOKENS.shape[1])[None]
    with sparse_prefill(model):
        return model(TOKENS, positions, model.new_cache(1, TOKENS.shape[1]))[0]


@torch.inference_mode()
def their_logits(model: Any) -> Tensor:
    """Logits [T, V] of TOKENS in one call."""
    return model(TOKENS).logits[0]


def input_of(model: Transformer, module: nn.Module) -> Tensor:
    """What module reads while our_logits are computed."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    our_logits(model)
    hook.remove()
    [x] = seen
    return x


def plan_between_entries(model: Transformer) -> SparsityPlan:
    """Makes a dense model sparse by the plan that it returns: about half, and rounding moves no |x| of TOKENS across.

    Thresholds lie in the widest gaps between the middle values of |x|, another one for each projection.
    """
    sparsify_ours(model, keep_all_plan(model.config))
    layers = []
    for modules in sparse_layers(model):
        layer: dict[str, ProjectionPlan] = {}
        for module in modules:
            values = input_of(model, module).abs().flatten().sort().values
            middle = values[len(values) * 2 // 5 : len(values) * 3 // 5]
            gaps = middle.diff().topk(len(module.names)).indices.tolist()
            limits = [float(middle[i] + middle[i + 1]) / 2 for i in gaps]
            module.set_thresholds(limits)
            layer |= {name: ProjectionPlan(0.5, limit) for name, limit in zip(module.names, limits, strict=True)}
        layers.append(layer)
    return SparsityPlan(config_fields(model.config), "test", 0.5, tuple(layers))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_our_model(name: str, tmp_path: Path) -> None:
    """With every token sparse. That our plan fits says that both know the same of the model."""
    family, overrides = FAMILIES[name]
    theirs: Any = save_tiny_model(tiny_config(family, **overrides), tmp_path)
    ours = load_model(tmp_path, CPU, torch.float32)
    plan, dense = plan_between_entries(ours), their_logits(theirs)
    assert sparsify(theirs, plan, prompts="sparse") is theirs
    assert relative_error(their_logits(theirs), dense) > 1e-2, f"{name}: nothing was dropped"
    assert_near(name, their_logits(theirs), our_logits(ours), 1e-5)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_generated_text_is_that_of_our_model(name: str, tmp_path: Path) -> None:
    """From a dense prompt, then sparse steps with transformers' own cache.

    Of one prompt of three: an entry that lies at its threshold on some processor changes all that follows.
    """
    family, overrides = FAMILIES[name]
    theirs: Any = save_tiny_model(tiny_config(family, **overrides), tmp_path)
    ours = load_model(tmp_path, CPU, torch.float32)
    plan_between_entries(ours).save(tmp_path / "plan.json")
    sparsify(theirs, tmp_path / "plan.json")
    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0}
    for prompt in (TOKENS, TOKENS + 1, TOKENS + 2):
        text, other = (m.generate(prompt, **options)[0, prompt.shape[1] :].tolist() for m in (theirs, dense))
        with torch.inference_mode():
            expected = continue_greedily(ours, prompt, STEPS)[0].tolist()
        if text == expected != other:
            return
    raise AssertionError(f"{name}: {text} instead of {expected}; dense {other}")


def test_steps_are_sparse_and_prompts_as_asked(hf_model: Any, tmp_path: Path) -> None:
    plan, dense = plan_with(tmp_path, THRESHOLDS), their_logits(hf_model)
    assert achieved_sparsity(sparsify(hf_model, plan)) == [{}] * 3
    modules = [module for layer in sparse_layers(hf_model) for module in layer]
    assert [module.names for module in modules] == [(name,) for name in PROJECTIONS] * 3

    def tokens_seen(run: Callable[[], Any]) -> set[float]:
        set_counting(hf_model, True)
        run()
        return {int(module.seen) / len(module.dequantized()) for module in modules}

    assert tokens_seen(lambda: hf_model.generate(TOKENS, do_sample=False, max_new_tokens=5, pad_token_id=0)) == {4}
    assert tokens_seen(lambda: hf_model.generate(TOKENS[:, :1], max_new_tokens=5, pad_token_id=0)) == {5}
    assert tokens_seen(lambda: assert_near("dense logits", their_logits(hf_model), dense, 1e-6)) == {0}
    sparsify(hf_model, plan, prompts="sparse")
    assert tokens_seen(lambda: their_logits(hf_model)) == {TOKENS.shape[1]}
    sparsify(hf_model, plan)
    assert tokens_seen(lambda: their_logits(hf_model)) == {0}


def test_achieved_sparsity_is_what_is_dropped(hf_model: Any, tmp_path: Path) -> None:
    sparsify(hf_model, plan_with(tmp_path, {"q": 0.0, "k": 1e9, "v": 0.5}), prompts="sparse")
    inputs: list[Tensor] = []
    hf_model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    set_counting(hf_model, True)
    their_logits(hf_model)
    shares = achieved_sparsity(hf_model)
    assert [list(layer) for layer in shares] == [list(PROJECTIONS)] * 3
    assert (shares[0]["q"], shares[0]["k"]) == (0, 1)
    assert shares[0]["v"] == pytest.approx(float((inputs[0].abs() < 0.5).float().mean()), abs=1e-6)
    set_counting(hf_model, False)
    their_logits(hf_model)
    assert achieved_sparsity(hf_model) == [{}] * 3


def test_thresholds_of_zero_leave_the_dense_model(hf_model: Any, tmp_path: Path) -> None:
    dense = their_logits(hf_model)
    sparsify(hf_model, plan_with(tmp_path, {}), prompts="sparse")
    assert_near("logits", their_logits(hf_model), dense, 1e-6)


def test_new_thresholds_on_a_sparse_model(hf_model: Any, tmp_path: Path) -> None:
    twice = copy.deepcopy(hf_model)
    sparsify(hf_model, plan_with(tmp_path, THRESHOLDS), prompts="sparse")
    sparsify(twice, plan_with(tmp_path, dict.fromkeys(PROJECTIONS, 0.9)))
    modules = list(twice.modules())
    sparsify(twice, plan_with(tmp_path, THRESHOLDS), prompts="sparse")
    assert list(twice.modules()) == modules
    assert torch.equal(their_logits(hf_model), their_logits(twice))


def test_rows_of_a_batch_are_those_alone(hf_model: Any, tmp_path: Path) -> None:
    """More of them than the sparse kernels take, too; and a shorter one with padding before it."""
    sparsify(hf_model, plan_with(tmp_path, THRESHOLDS))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    alone = [hf_model.generate(prompt, **options)[0, prompt.shape[1] :].tolist() for prompt in (TOKENS, TOKENS[:, 5:])]
    prompts = torch.cat((TOKENS.expand(9, -1), torch.cat((torch.zeros(1, 5, dtype=torch.int64), TOKENS[:, 5:]), 1)))
    made = hf_model.generate(prompts, attention_mask=(prompts > 0).long(), **options)[:, TOKENS.shape[1] :].tolist()
    assert made == [*[alone[0]] * 9, alone[1]]


@pytest.mark.parametrize(
    "dtype,limit", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)], ids=["fp32", "bf16", "fp16"]
)
def test_each_dtype_equals_the_definition(dtype: torch.dtype, limit: float, hf_model: Any, tmp_path: Path) -> None:
    """W (x masked at the threshold) + b, loaded in the dtype or brought to it afterwards."""
    linear = hf_model.model.layers[1].self_attn.k_proj
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    masked = torch.where(x.abs() >= torch.tensor(THRESHOLDS["k"]).to(dtype), x, 0).float()
    expected = nn.functional.linear(masked, linear.weight.to(dtype).float(), linear.bias.to(dtype).float())
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for model in (loaded, hf_model):
        module = sparsify(model, plan_with(tmp_path, THRESHOLDS)).to(dtype).model.layers[1].self_attn.k_proj
        assert module.thresholds.dtype == torch.float32 and module.weight.dtype == dtype
        with torch.inference_mode():
            steps = torch.cat([module(x[:, t : t + 1]) for t in range(x.shape[1])], dim=1)
            assert_near("steps", steps, expected, limit)
            sparsify(model, plan_with(tmp_path, THRESHOLDS), prompts="sparse")
            assert_near("prompt", module(x), expected, limit)
            assert model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-wide-heads", "phi3"])
def test_saved_and_loaded_weights_are_the_dense_model(name: str, tmp_path: Path) -> None:
    family, overrides = FAMILIES[name]
    model: Any = save_tiny_model(tiny_config(family, **overrides), tmp_path / "dense")
    dense, state = their_logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    plan = even_plan(load_config(tmp_path / "dense"), ProjectionPlan(0.5, 0.4))
    sparse = their_logits(sparsify(model, plan, prompts="sparse"))
    model.tie_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert {key: value.tolist() for key, value in model.state_dict().items()} == {
        key: value.tolist() for key, value in state.items()
    }
    model.save_pretrained(tmp_path / "saved")
    reloaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(their_logits(reloaded), dense)
    for assign in (False, True):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(state, assign=assign)
        assert torch.equal(their_logits(model), sparse)


def test_the_text_part_of_a_model_that_sees(tmp_path: Path) -> None:
    text = tiny_config("gemma3_text", **FAMILIES["gemma3"][1])
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    parts: dict[str, Any] = {"text_config": text.to_dict(), "vision_config": vision, "mm_tokens_per_image": 1}
    config = transformers.CONFIG_MAPPING["gemma3"](**parts)
    theirs: Any = save_tiny_model(config, tmp_path)
    ours = load_model(tmp_path, CPU, torch.float32)
    plan = plan_between_entries(ours)
    sparsify(theirs, plan, prompts="sparse")
    assert_near("logits", their_logits(theirs), our_logits(ours), 1e-5)
    sparse = [name for name, module in theirs.named_modules() if isinstance(module, SparseLinear)]
    assert len(sparse) == 3 * 7 and all("language_model.layers" in name for name in sparse)


class Linear4bit(nn.Linear):
    """As packages that quantize have them."""


class Shard(Tensor):
    """As a tensor of which a process holds a part."""


def with_other_linear(model: Any) -> None:
    model.model.layers[1].mlp.up_proj = Linear4bit(48, 88, bias=False)


def with_shard(model: Any) -> None:
    model.model.layers[2].mlp.down_proj.weight = nn.Parameter(torch.zeros(48, 88).as_subclass(Shard))


def with_part(model: Any) -> None:
    model.model.layers[2].mlp.down_proj.weight.data = torch.zeros(48, 44)


def with_offloaded(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.to("meta")


def with_hook(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)


def without_gate(model: Any) -> None:
    del model.model.layers[1].mlp.gate_proj


def of_unknown_family(model: Any) -> None:
    model.config = transformers.GPT2Config()


def of_our_layout(model: Any) -> None:
    model.config.teal_layout = 1


@pytest.mark.parametrize(
    "change,said",
    [
        (with_other_linear, r"^model\.layers\.1\.mlp\.up_proj is a .*test_transformers\.Linear4bit; expected a plain "),
        (with_shard, r"^model\.layers\.2\.mlp\.down_proj: weight is a Shard \(48, 88\); expected a Tensor \(48, 88\)"),
        (with_part, r"^model\.layers\.2\.mlp\.down_proj: weight is a Tensor \(48, 44\); expected a Tensor \(48, 88\)"),
        (with_offloaded, r"^model\.layers\.0\.self_attn\.q_proj: weight is torch\.float32 on meta; expected fp32"),
        (nn.Module.double, r"^model\.layers\.0\.self_attn\.q_proj: weight is torch\.float64 on cpu; expected fp32"),
        (with_hook, r"^model\.layers\.0\.self_attn\.o_proj has hooks, which would be lost; expected "),
        (without_gate, r"^model\.layers\.1\.mlp\.gate_proj is not there; expected a linear layer"),
        (of_unknown_family, r"^Qwen2ForCausalLM\.config: model_type 'gpt2' is not supported .*; expected one of llama"),
        (of_our_layout, r"^Qwen2ForCausalLM\.config: teal_layout 1 is of a folder that transformers misreads; exp"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_are_refused(change: Callable[[Any], Any], said: str, hf_model: Any, tmp_path: Path) -> None:
    """By one line, before anything is replaced."""
    change(hf_model)
    with pytest.raises(UserError, match=said) as error:
        sparsify(hf_model, plan_with(tmp_path, THRESHOLDS))
    assert "\n" not in str(error.value)
    assert not any(isinstance(module, TransformersLinear) for module in hf_model.modules())


def test_what_is_no_model_of_transformers(tiny_folder: Path) -> None:
    ours = load_model(tiny_folder, CPU, torch.float32)
    wrong: list[Any] = ["gpt2", ours, nn.Linear(2, 2), None]
    for thing in wrong:
        kind = type(thing).__name__
        with pytest.raises(UserError, match=f"takes a model of transformers, not {kind}; expected what from"):
            sparsify(thing, keep_all_plan(ours.config))


def test_plans_and_prompts_that_are_refused(hf_model: Any, tmp_path: Path) -> None:
    plan = plan_with(tmp_path, {})
    with pytest.raises(UserError, match=r"plan is for another model: 2 layers \(this model: 3\); calibrate"):
        sparsify(hf_model, replace(plan, layers=plan.layers[:2]))
    replace(plan, model=plan.model | {"hidden_size": 64}).save(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"^plan .*other\.json: plan is for another model: hidden_size 64 \(this mod"):
        sparsify(hf_model, str(tmp_path / "other.json"))
    with pytest.raises(UserError, match=r"^plan .*none\.json: not readable"):
        sparsify(hf_model, tmp_path / "none.json")
    other: Any = "half"
    with pytest.raises(UserError, match=r"^prompts 'half' is not usable; expected 'dense' or 'sparse'$"):
        sparsify(hf_model, plan, prompts=other)
    assert not any(isinstance(module, TransformersLinear) for module in hf_model.modules())


def test_the_package_is_not_needed_to_import() -> None:
    script = "import sys; sys.modules['transformers'] = None; import teal.transformers as t; print(t.sparsify.__name__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "sparsify\n", done.stderr
