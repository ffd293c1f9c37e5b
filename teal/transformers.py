"""Sparse projections in a model that transformers has loaded, by the same plan: `sparsify(model, plan)`.

For those who measure with programs that run models of transformers. It imports nothing of that package.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from teal.checkpoint.config import parse_config
from teal.checkpoint.families import Family, described
from teal.checkpoint.layout import PLAIN
from teal.errors import UserError
from teal.layers.phase import call_state
from teal.model import ModelConfig
from teal.plan import SparsityPlan, load_fitting_plan
from teal.projection import Projection
from teal.teal_layers import SparseLinear, achieved_sparsity, layers_of, set_counting, sparsify_layer

__all__ = ["achieved_sparsity", "set_counting", "sparsify"]
Model = TypeVar("Model", bound=nn.Module)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TransformersLinear(SparseLinear):
    """A SparseLinear in a model that does not announce its phase: a call with one token a row is a decode step.

    Its state_dict is nn.Linear's, weight [N, K] and bias: a model that is saved is the dense one.
    """

    def sparse_tokens(self, T: int) -> int:
        """All of a decode step; of a prompt the share that self.state names."""
        return T if T == 1 else super().sparse_tokens(T)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransformersLinear":
        """As of nn.Module, to another device or dtype; thresholds stay fp32."""
        limits, of_names = self.thresholds, self.name_thresholds
        super()._apply(fn, recurse)
        self.read(self.segments, limits.to(self.weight.device), of_names.to(self.weight.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (weight := state_dict.get(f"{prefix}weight")) is not None:
            state_dict = state_dict | {f"{prefix}weight": weight.t().contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *rest)


def sparsify(model: Model, plan: SparsityPlan | str | Path, prompts: Literal["dense", "sparse"] = "dense") -> Model:
    """Replace the projections of every layer, in place, by sparse ones with the plan's thresholds; returns model.

    model: of a family in families.py, as from_pretrained gives it, in fp32, bf16 or fp16; for inference. plan: one for
    the same checkpoint, or its file. A call with one token a row is a decode step, and sparse. Calls with more are
    prompts: dense, or with prompts="sparse" every token as sparse as generated ones. Texts that are only scored need
    that. Called again, it sets thresholds and prompts anew.

    Raises UserError for what is no model, an unknown family, linear layers that are not plain, or a plan for another
    model. Then nothing is changed.
    """
    if prompts not in ("dense", "sparse"):
        raise UserError(f"prompts {prompts!r} is not usable; expected 'dense' or 'sparse'")
    config, family = _description(model)
    if isinstance(plan, SparsityPlan):
        plan.check_fits(config)
    else:
        plan = load_fitting_plan(Path(plan), config)
    layers, projections = layers_of(model), _projections(config, family)
    places = {module: name for name, module in model.named_modules()}
    for layer in layers:
        for p in projections:
            _check_linear(layer, f"{places[layer]}.{p.module}", p)
    for layer, planned in zip(layers, plan.layers, strict=True):
        sparsify_layer(layer, projections, {name: p.threshold for name, p in planned.items()}, TransformersLinear)
    call_state(model).sparse_share = float(prompts == "sparse")
    return model


def _description(model: nn.Module) -> tuple[ModelConfig, Family]:
    """What the model's own config says. Raises UserError if it has none, or for a model that has no plans."""
    name = type(model).__name__
    config: Any = getattr(model, "config", None)
    if not (isinstance(model, nn.Module) and hasattr(model, "get_decoder") and hasattr(config, "to_dict")):
        raise UserError(f"sparsify takes a model of transformers, not {name}; expected what from_pretrained returns")
    raw, place = config.to_dict(), Path(f"{name}.config")
    if raw.get(PLAIN):
        raise UserError(
            f"{place}: {PLAIN} {raw[PLAIN]!r} is of a folder that transformers misreads; "
            "expected the checkpoint that it was made from"
        )
    return parse_config(raw, place), described(place, raw)[1]


def _projections(config: ModelConfig, family: Family) -> list[Projection]:
    """Those of a layer as transformers holds them: module is the place of each linear layer there."""
    holders = {part: whole for whole, parts in family.fused.items() for part in parts}
    found = []
    for p in config.projections():
        stacked = list(zip(p.names, p.sizes, p.hf_names, strict=True))
        for module in dict.fromkeys(holders.get(name, name) for name in p.hf_names):
            names, sizes, hf_names = zip(*(s for s in stacked if holders.get(s[2], s[2]) == module), strict=True)
            found.append(replace(p, module=module, names=names, sizes=sizes, hf_names=hf_names))
    return found


def _check_linear(layer: nn.Module, place: str, p: Projection) -> None:
    """Raise UserError, naming the place, unless a SparseLinear can do all that is there now."""
    try:
        linear = layer.get_submodule(p.module)
    except AttributeError:
        raise UserError(f"{place} is not there; expected a linear layer, as in transformers' own code") from None
    if isinstance(linear, TransformersLinear):
        return
    if type(linear) is not nn.Linear:  # those of quantized models derive from it
        kind = f"{type(linear).__module__}.{type(linear).__name__}"
        raise UserError(f"{place} is a {kind}; expected a plain torch.nn.Linear, neither quantized nor adapted")
    weight, shape = linear.weight.data, (sum(p.sizes), p.in_features)
    if type(weight) is not Tensor or weight.shape != shape:
        found = f"{type(weight).__name__} {tuple(weight.shape)}"
        raise UserError(f"{place}: weight is a {found}; expected a Tensor {shape}, of a model in one process")
    if weight.is_meta or weight.dtype not in DTYPES:
        raise UserError(
            f"{place}: weight is {weight.dtype} on {weight.device}; expected fp32, bf16 or fp16, and no offloading"
        )
    if linear._forward_hooks or linear._forward_pre_hooks:
        raise UserError(f"{place} has hooks, which would be lost; expected a model without, to be hooked afterwards")
