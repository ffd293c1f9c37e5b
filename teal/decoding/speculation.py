"""Engines that draft: the dense model's own text, several tokens a pass (drafting.py).

The draft is the same model with sparse activations, whose tensors and KV cache it shares; with weights rounded to 8 or
4 bits for it, it has those of its own and shares the rest. Or it looks up what followed the last few tokens before.
"""

import copy
from dataclasses import replace
from typing import Any

from typing_extensions import Self

from teal.checkpoint.loading import Check, LoadedModel, load_for_decoding, round_weights
from teal.decoding.drafting import Draft, Drafter
from teal.decoding.engine import Engine, choose_plan
from teal.errors import UserError
from teal.options import check_length
from teal.plan import keep_all_plan
from teal.teal_layers import sparsify

SAVED_BY_SPARSITY = 0.8  # of a draft step's time at sparsity 1: 40% less at 50%, as on an H100 (BENCHMARKS.md)
ROUNDED_COST = {None: 1.0, "int8": 0.63, "int4": 0.48}  # of a step with these weights, at 50%, there too


class SpeculativeEngine(Engine):
    """An Engine that drafts after a call of draft_with or look_up; its text is then the dense model's."""

    @classmethod
    def load_with_draft(
        cls,
        checkpoint: str | None = None,
        *,
        length: int,
        draft_sparsity: float = 0.5,
        draft_plan: str | None = None,
        draft_quant: str | None = None,
        random_weights: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        compile: bool | None = None,
        quant: str | None = None,
        quant_lm_head: bool = False,
        kv_cache: str = "float",
        force_plan: bool = False,
        check: Check | None = None,
    ) -> Self:
        """As Engine.load, an engine that drafts up to length tokens by sparse steps of the model.

        draft_sparsity or the file draft_plan say how sparse; draft_quant ("int8", "int4") rounds the weights of the draft
        alone, and its output head to 8 bits. Raises UserError.
        """
        check_length(length)
        loaded = load_for_decoding(
            checkpoint,
            random_weights,
            device,
            dtype,
            draft_quant is None,
            quant,
            quant_lm_head,
            kv_cache,
            force_plan,
            check,
        )
        draft = make_draft(loaded, draft_sparsity, draft_plan, draft_quant, compile)
        # A draft with the same weights needs them in the sparse layout, and the dense model then keeps all of them.
        plan = keep_all_plan(loaded.model.config) if draft_quant is None else None
        engine = cls.from_loaded(loaded, plan, compile)
        engine.draft_with(draft, length)
        return engine

    def draft_with(self, draft: Draft, length: int) -> None:
        """Draft up to length tokens a round by sparse steps. Raises UserError."""
        self.compile_s += draft.compile_s
        self._use_drafter(Drafter(self.backend, length, draft))

    def look_up(self, length: int) -> None:
        """Draft up to length tokens a round by looking up what followed before. Raises UserError."""
        self._use_drafter(Drafter(self.backend, length))

    def _use_drafter(self, drafter: Drafter) -> None:
        with self.use.taken():
            self.drafter = drafter


def make_draft(
    loaded: LoadedModel, sparsity: float, plan: str | None, quant: str | None, compile: bool | None
) -> Draft:  # fmt: skip
    """A sparse copy of loaded that shares its tensors; with quant ("int8", "int4") its projections and head are its own.

    plan, a file, goes before sparsity. Without quant loaded becomes sparse in place, at sparsity 0. Raises UserError.
    """
    if plan is None and not 0 < sparsity < 1:
        raise UserError(f"--draft-sparsity {sparsity:g} is out of range; expected 0 < sparsity < 1")
    if quant is None:
        chosen = choose_plan(loaded, sparsity, plan)
        sparsify(loaded.model, keep_all_plan(loaded.model.config))
        copied = sharing_copy(loaded)
    else:
        copied = sharing_copy(loaded)
        round_weights(copied, quant, quant_lm_head=True, option="--draft-quant")
        chosen = choose_plan(copied, sparsity, plan)
        loaded.calibrate_s = copied.calibrate_s  # which began with loaded's
    engine = Engine.from_loaded(copied, chosen, compile)
    cost = ROUNDED_COST[quant] * (1 - SAVED_BY_SPARSITY * chosen.target)
    return Draft(engine.backend, cost, engine.compile_s)


def sharing_copy(loaded: LoadedModel) -> LoadedModel:
    """A copy whose modules and buffers (thresholds) are its own and whose parameters are those of loaded."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, shared))
