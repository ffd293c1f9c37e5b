"""The multiple-choice task made from a text: its items, its scores beside transformers', and the option."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from teal.calibration.texts import default_text
from teal.calibration.thresholds import Settings, calibrate
from teal.checkpoint.weights import load_model
from teal.cli import evaluate as evaluate_cli
from teal.errors import UserError
from teal.evaluation.choices import OFFSETS, PASSAGE, PIECE, SPAN, choice_scores, log_likelihoods, make_items
from teal.evaluation.quality import Case
from teal.model import Transformer
from teal.plan import SparsityPlan, keep_all_plan
from teal.teal_layers import sparsify
from tests.conftest import assert_one_line_error
from tests.evaluation.test_evaluation import InvokeMain

ITEMS = 10


@pytest.fixture
def model(tiny_folder: Path) -> Transformer:
    return load_model(tiny_folder, torch.device("cpu"), torch.float32)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(5, 300, (SPAN + 400,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plan(tiny_folder: Path) -> SparsityPlan:
    sequences = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(2))
    return calibrate(load_model(tiny_folder, torch.device("cpu"), torch.float32), sequences, Settings((0.6,)), {})[0]


def test_items_are_cut_from_the_text() -> None:
    """Of a text that counts: each item begins on its own place, and its pieces follow the passage at the offsets."""
    found = make_items(torch.arange(SPAN + 2 * PIECE), 3)
    assert found[:, 0, 0].tolist() == [0, PIECE, 2 * PIECE]
    for i, item in enumerate(found):
        for row, offset in zip(item, OFFSETS, strict=True):
            start = i * PIECE
            assert row[:PASSAGE].tolist() == list(range(start, start + PASSAGE))
            assert row[PASSAGE:].tolist() == list(range(start + PASSAGE + offset, start + PASSAGE + offset + PIECE))


def test_too_short_a_text() -> None:
    with pytest.raises(UserError, match=f"3 needs {SPAN + 2 * PIECE} tokens of text; there are {SPAN + 2 * PIECE - 1}"):
        make_items(torch.arange(SPAN + 2 * PIECE - 1), 3)


def by_transformers(folder: Path, tokens: Tensor) -> Tensor:
    """Log-likelihoods [ITEMS, 4] of the pieces, token by token."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = torch.zeros(ITEMS, len(OFFSETS))
    for i, item in enumerate(make_items(tokens, ITEMS)):
        for j, row in enumerate(item):
            with torch.inference_mode():
                log_probs = reference(row[None]).logits[0].log_softmax(-1)
            found[i, j] = sum(log_probs[at - 1, row[at]] for at in range(PASSAGE, len(row)))
    return found


def test_scores_are_those_of_transformers(model: Transformer, tokens: Tensor, tiny_folder: Path) -> None:
    expected = by_transformers(tiny_folder, tokens)
    torch.testing.assert_close(log_likelihoods(model, make_items(tokens, ITEMS)), expected, rtol=1e-4, atol=1e-3)
    [row] = choice_scores(model, [Case("dense", 0.0, None)], tokens, ITEMS)
    right = sum(scores[0] == max(scores) for scores in expected.tolist())
    assert row == {"choice_accuracy": right / ITEMS, "choice_agreement": 1.0}
    assert 0 < right < ITEMS


def test_plans_policies_and_a_reference(
    model: Transformer, tokens: Tensor, plan: SparsityPlan, tiny_folder: Path
) -> None:
    sparsify(model, plan)
    cases = [
        Case("dense", 0.0, None), Case("all", 0.0, keep_all_plan(model.config)),
        Case("u", 0.6, plan), Case("u", 0.6, plan, "half"),
    ]  # fmt: skip
    dense, all_kept, sparse, half = choice_scores(model, cases, tokens, 20)
    assert all_kept == dense and sparse != dense and half != sparse
    other = load_model(tiny_folder, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        other.lm_head.weight.neg_()  # prefers what the model likes least
    [against] = choice_scores(model, cases[:1], tokens, 20, other)
    assert against["choice_accuracy"] == dense["choice_accuracy"] and against["choice_agreement"] < 0.5


def test_a_tie_is_no_win(model: Transformer) -> None:
    [row] = choice_scores(model, [Case("dense", 0.0, None)], torch.full((SPAN + 100,), 9), 4)
    assert row == {"choice_accuracy": 0.0, "choice_agreement": 1.0}


def test_the_option(call_main: InvokeMain, tiny_folder: Path, plan: SparsityPlan, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(default_text()[:20_000])
    plan.save(tmp_path / "plan.json")
    options = (
        *("--checkpoint", tiny_folder, "--device", "cpu", "--dtype", "fp32", "--text", tmp_path / "text.txt"),
        *("--plan", tmp_path / "plan.json", "--tokens", "400", "--json"),
    )
    code, out, err = call_main(evaluate_cli.main, *options, "--choices", "8")
    assert code == 0, err
    dense, sparse = json.loads(out)["rows"]
    assert dense["choice_agreement"] == 1 and 8 * sparse["choice_accuracy"] in range(9)
    code, _, err = call_main(evaluate_cli.main, *options, "--choices", "500")
    assert_one_line_error(code, err, "--choices 500 needs 8224 tokens of text; there are 400")
