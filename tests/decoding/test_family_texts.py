"""Every model family drafts for itself, and answers requests beside others, with the texts of plain decoding."""

from dataclasses import replace
from pathlib import Path

import pytest

from teal.checkpoint.weights import stored_config
from teal.decoding.engine import Engine
from teal.decoding.speculation import SpeculativeEngine
from teal.options import DraftOptions, ModelOptions
from teal.plan import ProjectionPlan, even_plan
from tests.checkpoint.test_families import FAMILIES
from tests.conftest import save_tiny_model, tiny_config
from tests.decoding.test_scheduler import run

PROMPTS = [[5, 9, 33, 120, 7, 250, 61], [8, 8], [i * 7 % 190 + 5 for i in range(18)]]
TOKENS = 20
ONE_OF_EACH = {kind: name for name, (kind, _) in FAMILIES.items()}


@pytest.mark.parametrize("family", ONE_OF_EACH.values())
def test_drafted_and_shared_texts(family: str, tmp_path: Path, byte_level_tokenizer_json: str) -> None:
    kind, options = FAMILIES[family]
    save_tiny_model(tiny_config(kind, **options | {"vocab_size": 300}), tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level_tokenizer_json, encoding="utf-8")
    even_plan(stored_config(tmp_path), ProjectionPlan(0.2, 0.15)).save(tmp_path / "plan.json")
    model = ModelOptions(str(tmp_path), device="cpu", dtype="fp32")

    def texts(engine: Engine) -> list[list[int]]:
        return [list(engine.generate(prompt, max_new_tokens=TOKENS, ignore_eos=True)) for prompt in PROMPTS]

    dense = texts(Engine.load(model))
    drafting = SpeculativeEngine.load_with_draft(model, DraftOptions(length=4, plan=str(tmp_path / "plan.json")))
    assert texts(drafting) == dense
    assert drafting.stats.drafted_tokens > 0

    sparse = Engine.load(replace(model, plan=str(tmp_path / "plan.json")))
    together = run(sparse, PROMPTS, ignore_eos=True)
    for prompt, found in zip(PROMPTS, together, strict=True):
        [alone] = run(sparse, [prompt], ignore_eos=True)
        assert (found.text, found.logprobs) == (alone.text, alone.logprobs)
