"""Drafts with the weights of a folder that quantize.py made: their texts, what they share, and folders refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from teal.bench.speculate import parse_draft
from teal.checkpoint.rotation import Rotation, write_rotated
from teal.checkpoint.weights import stored_config
from teal.cli import generate, quantize, serve
from teal.decoding.engine import Engine
from teal.decoding.speculation import STEP_COST, SpeculativeEngine
from teal.errors import UserError
from teal.layers.quantized_linear import QuantConfig, QuantizedHead
from teal.options import DraftOptions, ModelOptions
from teal.plan import ProjectionPlan, even_plan, plan_name
from teal.teal_layers import sparse_layers
from tests.conftest import assert_one_line_error

Command = Callable[..., tuple[int, str, str]]
SEQUENCES = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(0))
PROMPTS = [[5, 9, 33, 120, 7, 250, 61], [8, 8], [i * 7 % 190 + 5 for i in range(40)], [11, 12, 13] * 6]


@pytest.fixture(scope="module")
def rotated(quantizable_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in an arbitrary basis, with a head of its own."""
    config = stored_config(quantizable_folder)
    generator = torch.Generator().manual_seed(1)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim, config.head_dim)
    residual = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size, generator=generator))[0]
    heads = torch.linalg.qr(torch.randn(shape, generator=generator))[0]
    folder = tmp_path_factory.mktemp("drafts") / "rotated"
    write_rotated(quantizable_folder, folder, Rotation(residual, heads), {})
    return folder


def rounded(source: Path, head: bool) -> Path:
    """A folder of mixed bits beside source."""
    out = source.parent / f"{source.name}-mixed-{head}"
    if not out.exists():
        config = QuantConfig("mixed", 32, lm_head=head, average_bits=5.0)
        quantize.quantize_folder(source, out, config, "gptq", SEQUENCES, "cpu")
    return out


def speculative(folder: Path, draft: Path, sparsity: float = 0.4, kv_cache: str = "float") -> SpeculativeEngine:
    model = ModelOptions(str(folder), device="cpu", dtype="fp32", kv_cache=kv_cache)
    return SpeculativeEngine.load_with_draft(model, DraftOptions(length=4, sparsity=sparsity, checkpoint=str(draft)))


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_greedy_text_is_the_dense_models(rotated: Path, sparsity: float, kv_cache: str) -> None:
    options = ModelOptions(str(rotated), device="cpu", dtype="fp32", kv_cache=kv_cache)
    dense = Engine.load(options)
    engine = speculative(rotated, rounded(rotated, head=True), sparsity, kv_cache)
    drafted = accepted = 0
    for prompt in PROMPTS:
        texts = [list(e.generate(prompt, max_new_tokens=40, ignore_eos=True)) for e in (engine, dense)]
        assert texts[0] == texts[1]
        drafted += engine.stats.drafted_tokens
        accepted += engine.stats.accepted_tokens
    assert 0.3 * drafted < accepted < drafted, f"{accepted} of {drafted}: the draft is no model like the dense one"


@pytest.mark.parametrize("head", [False, True])
def test_it_shares_embedding_and_a_head_in_floats(rotated: Path, head: bool) -> None:
    engine = speculative(rotated, rounded(rotated, head))
    assert engine.drafter is not None and engine.drafter.backend is not None
    draft = engine.drafter.backend.model
    assert draft.embedding is engine.model.embedding
    assert isinstance(draft.lm_head, QuantizedHead) == head
    assert (draft.lm_head is engine.model.lm_head) != head
    assert engine.drafter.cost == pytest.approx(STEP_COST[4] * (1 - 0.8 * 0.4))


def test_the_plan_is_the_one_beside_the_draft(rotated: Path, tmp_path: Path) -> None:
    draft = shutil.copytree(rounded(rotated, head=False), tmp_path / "draft")
    even_plan(stored_config(rotated), ProjectionPlan(0.4, 0.125)).save(draft / plan_name(0.4))
    engine = speculative(rotated, draft)
    assert engine.drafter is not None and engine.drafter.backend is not None
    for modules in sparse_layers(engine.drafter.backend.model):
        assert [float(module.thresholds.max()) for module in modules] == [0.125] * len(modules)


def test_refusals(rotated: Path, quantizable_folder: Path) -> None:
    draft = rounded(rotated, head=False)
    with pytest.raises(UserError, match=r"draft_checkpoint .*: was made from rotated .*, not from quantizable\d* "):
        speculative(quantizable_folder, draft)
    with pytest.raises(UserError, match=r"draft_checkpoint .*rotated: is not quantized; give a folder of quantize.py"):
        speculative(rotated, rotated)
    with pytest.raises(UserError, match="draft_quant does not go with draft_checkpoint"):
        DraftOptions(quant="int4", checkpoint=str(draft))
    with pytest.raises(UserError, match="draft_checkpoint does not go with draft_lookup"):
        DraftOptions(lookup=True, checkpoint=str(draft))
    with pytest.raises(UserError, match="draft_sparsity 0 is out of range; expected 0 < sparsity < 1, or 0 of rounded"):
        DraftOptions(sparsity=0.0)


def test_the_command(rotated: Path, call_main: Command) -> None:
    model = ("--checkpoint", rotated, "--device", "cpu", "--dtype", "fp32", "--prompt", "x y", "--max-new-tokens", "30")
    draft = ("--draft-checkpoint", rounded(rotated, head=True), "--draft-sparsity", "0.3")
    _, dense, _ = call_main(generate.main, *model)
    code, text, err = call_main(generate.main, *model, "--speculate", "4", *draft)
    assert code == 0 and text == dense and "tokens drafted" in err
    assert_one_line_error(*call_main(generate.main, *model, *draft)[::2], "--draft-checkpoint goes with --speculate K")
    code, _, err = call_main(generate.main, *model, "--speculate", "4", "--draft-checkpoint", rotated)
    assert_one_line_error(code, err, "is not quantized")


def test_the_server_drafts_so_too(rotated: Path) -> None:
    options = ModelOptions(str(rotated), device="cpu", dtype="fp32")
    draft = DraftOptions(length=4, sparsity=0.3, checkpoint=str(rounded(rotated, head=True)))
    engine, _ = serve.load_engine(options, draft, ())
    text = list(engine.generate(PROMPTS[0], max_new_tokens=20, ignore_eos=True))
    assert text == list(Engine.load(options).generate(PROMPTS[0], max_new_tokens=20, ignore_eos=True))
    assert engine.stats.accepted_tokens > 0
    with pytest.raises(UserError, match="is not quantized"):
        serve.load_engine(options, DraftOptions(checkpoint=str(rotated)), ())


def test_drafts_of_the_bench() -> None:
    assert parse_draft("0.5") == DraftOptions(length=1, sparsity=0.5)
    assert parse_draft("int4:0") == DraftOptions(length=1, sparsity=0.0, quant="int4")
    assert parse_draft("/a:b/c:0.4") == DraftOptions(length=1, sparsity=0.4, checkpoint="/a:b/c")
    for text in ("int4", "0", "FOLDER", "int4:1", "", "int4:"):
        with pytest.raises(UserError, match="sparsity"):
            parse_draft(text)
