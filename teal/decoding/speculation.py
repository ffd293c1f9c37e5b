"""Engines that draft: the dense model's own text, several tokens a pass (drafting.py).

The draft is the same model with sparse activations, whose tensors and KV cache it shares. With rounded weights, made
at load or by quantize.py, it has those of its own and shares the rest. Or it looks up what followed the last few tokens
before.
"""

import copy
from dataclasses import replace
from typing import Any

from typing_extensions import Self

from teal.calibration.choose import choose_plan
from teal.checkpoint.loading import (
    Check,
    Described,
    LoadedModel,
    check_draft_fit,
    load_draft,
    load_for_decoding,
    round_weights,
)
from teal.decoding.drafting import Draft, Drafter
from teal.decoding.engine import Engine
from teal.layers.quantized_linear import QuantizedLinear
from teal.options import DraftOptions, ModelOptions, check_speculation
from teal.plan import keep_all_plan
from teal.teal_layers import sparsify

SAVED_BY_SPARSITY = 0.8  # of a draft step's time at sparsity 1: 40% less at 50%, as on an H100 (BENCHMARKS.md)
STEP_COST = {16: 1.0, 8: 0.63, 4: 0.48}  # of a step with weights of so many bits, at 50%, there too


class SpeculativeEngine(Engine):
    """An Engine that drafts after a call of draft_with or look_up; its text is then the dense model's."""

    @classmethod
    def load_with_draft(cls, model: ModelOptions, draft: DraftOptions, *, check: Check | None = None) -> Self:
        """As Engine.load, a dense engine that drafts. Raises UserError."""
        check_speculation(model)

        def check_both(described: Described) -> None:
            check_draft_fit(draft, described, model.force_plan)
            if check is not None:
                check(described)

        if draft.lookup:
            engine = cls.load(model, check=check_both)
            engine.look_up(draft.length)
            return engine
        loaded = load_for_decoding(model, check_both, sparse=not draft.has_own_weights)
        drafter = make_draft(loaded, draft, model.compile)
        # A draft with the same weights needs them in the sparse layout, and the dense model then keeps all of them.
        plan = None if draft.has_own_weights else keep_all_plan(loaded.model.config)
        engine = cls.from_loaded(loaded, plan, model.compile, model.backend)
        engine.draft_with(drafter, draft.length)
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


def make_draft(loaded: LoadedModel, options: DraftOptions, compile: bool | None = None) -> Draft:
    """A sparse copy of loaded that shares its tensors; with weights of its own its projections and head do not.

    Without them loaded becomes sparse in place, at sparsity 0. Raises UserError.
    """
    if not options.has_own_weights:
        cost = 1.0
        plan = choose_plan(loaded, options.sparsity, options.plan)
        sparsify(loaded.model, keep_all_plan(loaded.model.config))
        draft = sharing_copy(loaded)
    else:
        draft = rounded_draft(loaded, options)
        cost = step_cost(draft) / step_cost(loaded)
        plan = choose_plan(draft, options.sparsity, options.plan)
        loaded.calibrate_s += draft.calibrate_s
    engine = Engine.from_loaded(draft, plan, compile)
    return Draft(engine.backend, cost * (1 - SAVED_BY_SPARSITY * plan.target), engine.compile_s)


def rounded_draft(loaded: LoadedModel, options: DraftOptions) -> LoadedModel:
    """A dense draft with the rounded weights that options ask for. Raises UserError."""
    if options.checkpoint is not None:
        return load_draft(options.checkpoint, loaded)
    draft = replace(sharing_copy(loaded), calibrate_s=0.0)
    assert options.quant is not None
    round_weights(draft, options.quant, quant_lm_head="int8", parameter="draft_quant")
    return draft


def step_cost(loaded: LoadedModel) -> float:
    """The time of its decode step over that of one with weights in 16 bits; loaded is dense."""
    modules = loaded.model.layers.modules()
    return STEP_COST[next((module.bits for module in modules if isinstance(module, QuantizedLinear)), 16)]


def sharing_copy(loaded: LoadedModel) -> LoadedModel:
    """A copy whose modules and buffers (thresholds) are its own and whose parameters are those of loaded."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in loaded.model.parameters()}
    return replace(loaded, model=copy.deepcopy(loaded.model, shared))
