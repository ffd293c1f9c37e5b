"""A task made from any text: which of four pieces continues a passage?

An item is a passage of 32 tokens and four pieces of 16. One follows the passage, the other three come later in the same
text. The model takes the piece that it gives the highest log-likelihood after the passage. Chance is right for a
quarter of the items. This is scored as HellaSwag and other multiple-choice tasks are (Zellers et al. 2019), but needs
no data set. All pieces have as many tokens and share a topic, so what tells them apart is how the text goes on.
"""

import torch
from torch import Tensor

from teal.errors import ParameterError
from teal.evaluation.quality import Case
from teal.model import Transformer
from teal.options import POLICY_SHARES
from teal.progress import progress
from teal.teal_layers import sparse_prefill, sparsify

PASSAGE = 32  # tokens before the pieces
PIECE = 16  # tokens of a piece
OFFSETS = (0, 64, 128, 192)  # tokens from the passage's end to each piece
SPAN = PASSAGE + OFFSETS[-1] + PIECE  # tokens of text that an item is made from
ITEMS_AT_ONCE = 8


def check_items(count: int, items: int) -> None:
    """Raise ParameterError unless a text of count tokens has so many items whose true pieces do not overlap."""
    if items and count < (needed := SPAN + (items - 1) * PIECE):
        raise ParameterError("{choices} {} needs {} tokens of text; there are {}", items, needed, count)


def make_items(tokens: Tensor, items: int) -> Tensor:
    """int64 [items, 4, PASSAGE + PIECE]: passages with each of their pieces, at even spacing over tokens [T].

    The first of the four is the true one. Raises ParameterError for too few tokens.
    """
    check_items(len(tokens), items)
    last = len(tokens) - SPAN
    starts = [i * last // max(1, items - 1) for i in range(items)]
    rows = []
    for start in starts:
        passage, rest = tokens[start : start + PASSAGE], tokens[start + PASSAGE : start + SPAN]
        rows.append(torch.stack([torch.cat((passage, rest[offset : offset + PIECE])) for offset in OFFSETS]))
    return torch.stack(rows)


@torch.inference_mode()
def log_likelihoods(model: Transformer, items: Tensor) -> Tensor:
    """Of each item's pieces after its passage, fp32 [N, 4], for items as make_items gives them."""
    N, pieces, length = items.shape
    found = []
    for rows in progress(list(items.view(N * pieces, length).split(ITEMS_AT_ONCE * pieces)), "choosing", "batch"):
        ids = rows.to(model.device)
        positions = torch.arange(length, device=model.device).expand(len(ids), length)
        hidden = model.hidden_states(ids, positions, model.new_cache(len(ids), length))
        log_probs = model.logits(hidden[:, PASSAGE - 1 : -1]).float().log_softmax(-1)
        found.append(log_probs.gather(2, ids[:, PASSAGE:, None]).sum(dim=(1, 2)).cpu())
    return torch.cat(found).view(N, pieces)


def choice_scores(
    model: Transformer, cases: list[Case], tokens: Tensor, items: int, reference: Transformer | None = None
) -> list[dict[str, float]]:
    """For each case the share of items where the true piece wins, and where the piece is the one of the reference.

    A tie is no win. reference is by default the model itself, dense. The case's policy says which tokens of an item
    are sparse. model must be sparse already if any case has a plan. Raises ParameterError for too few tokens.
    """
    made = make_items(tokens, items)
    dense = log_likelihoods(model, made)
    expected = (dense if reference is None else log_likelihoods(reference, made)).argmax(-1)
    rows = []
    for case in cases:
        scores = dense
        if case.plan is not None:
            sparsify(model, case.plan)
            with sparse_prefill(model, POLICY_SHARES[case.policy]):
                scores = log_likelihoods(model, made)
        right = scores[:, 0] > scores[:, 1:].amax(-1)
        same = scores.argmax(-1) == expected
        rows.append({"choice_accuracy": float(right.double().mean()), "choice_agreement": float(same.double().mean())})
    return rows
