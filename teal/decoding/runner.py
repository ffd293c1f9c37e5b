"""A model ready to decode: beside its layers the backend that runs them, its plan, and what drafts for it."""

from typing import Any

from teal.checkpoint.tokenizer import Tokenizer
from teal.decoding.backend import Backend
from teal.decoding.drafting import Drafter
from teal.decoding.plan_switch import PlanSwitch
from teal.decoding.ranks import calls_of, on_all_ranks
from teal.errors import UserError
from teal.layers.team import team_of
from teal.plan import SparsityPlan, Weights


class ModelRunner:
    """What a Decoder runs. use_graph: whether steps are CUDA graphs; layout: the plan's number in plan_switch.py.

    calls: where other ranks hear of what it does, if several share the model; rows: its DecodeRows then, by number.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer) -> None:
        self.backend = backend
        self.model = backend.model
        self.tokenizer = tokenizer
        self.plan: SparsityPlan | None = None
        self.plan_switch: PlanSwitch | None = None  # None: dense
        self.weights: Weights | None = None  # what plans know the model by
        self.layout = 0
        self.drafter: Drafter | None = None
        self.device, self.dtype = self.model.device, self.model.dtype
        self.use_graph = backend.compiles and self.model.device.type == "cuda"
        team = team_of(self.model)
        self.calls = None if team is None or team.in_step else calls_of(team)
        self.address: tuple[int, int | None] = (0 if self.calls is None else self.calls.add(self), None)
        self.rows: list[Any] = []

    @property
    def follows(self) -> bool:
        """Whether it only does what another rank tells."""
        return self.calls is not None and not self.calls.leads

    def add_rows(self, rows: Any, *arguments: Any) -> tuple[int, int | None]:
        """The address of new DecodeRows of these arguments. Other ranks have those of a new runner, and make more."""
        if self.calls is None:
            return self.address
        self.rows.append(rows)
        number = len(self.rows) - 1
        if number:
            self.calls.tell(self.address[0], number, "", *arguments)
        return self.address[0], number

    def require_sparse(self) -> PlanSwitch:
        """What switches plans. Raises UserError if the model is dense."""
        if self.plan is None or self.plan_switch is None:
            raise UserError("this engine was loaded dense; load it with a sparsity or a plan")
        return self.plan_switch

    def switch_plan(self, plan: SparsityPlan) -> None:
        """Decode by plan from now on. Raises UserError if the model is dense or the plan is for another one."""
        self.require_sparse()
        plan.check_weights(self.weights)
        plan.check_fits(self.model.config)
        self.set_plan(plan)

    @on_all_ranks
    def set_plan(self, plan: SparsityPlan) -> None:
        """As switch_plan, for one that fits."""
        self.layout = self.require_sparse().use(plan)
        self.plan = plan

    def cache_key(self, plan: SparsityPlan | None) -> object:
        """What keys and values depend on beside their tokens: they may be reused where it is equal."""
        return plan, 0.0 if self.plan_switch is None else self.plan_switch.sparse_share

    def drafts_under(self, plan: SparsityPlan | None) -> bool:
        """Whether it drafts: not under a plan that drops anything, whose text the verifying pass does not give."""
        return self.drafter is not None and (plan is None or drops_nothing(plan))


def drops_nothing(plan: SparsityPlan) -> bool:
    """Whether the plan is dense decoding."""
    return not any(projection.threshold for layer in plan.layers for projection in layer.values())
