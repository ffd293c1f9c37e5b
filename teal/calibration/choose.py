"""Which plan a model gets: a file's, the one beside the checkpoint, or a quick one, made once and kept."""

import sys
import time

from teal.calibration.texts import default_text, text_hash
from teal.calibration.thresholds import QUICK_GRADIENTS, calibrate_quickly
from teal.checkpoint.loading import LoadedModel, load_plan, part_plan
from teal.errors import ParameterError, UserError
from teal.layers.block_linear import floats_kept
from teal.layers.int8_cache import has_int8_cache
from teal.options import Settings
from teal.plan import SparsityPlan, cached_curves, cached_plan, keep_all_plan, plan_file


def choose_plan(
    loaded: LoadedModel, sparsity: float, plan: str | None, can_calibrate: bool = True
) -> SparsityPlan:  # fmt: skip
    """The plan in the file named plan, or the one for this sparsity beside the checkpoint, or a quick one.

    Sparsity 0 without a file is the plan that keeps all.
    """
    if plan is None and sparsity == 0:
        return keep_all_plan(loaded.model.config)
    path = plan_file(loaded.folder, sparsity, plan)
    return quick_plan(loaded, sparsity, can_calibrate) if path is None else load_plan(path, loaded)


def quick_plan(loaded: LoadedModel, sparsity: float, can_calibrate: bool = True) -> SparsityPlan:
    """A plan calibrated on the default text, or found in the cache; calibrating makes the model sparse.

    It is a global one, but for a model whose keys and values are rounded, which no gradient passes: a uniform one. The
    cache keeps the errors that a global one is found by, so that another sparsity takes half the time.
    Raises UserError if it is not in the cache and can_calibrate says that the model cannot be calibrated.
    """
    text = default_text()
    method = "uniform" if has_int8_cache(loaded.model) else "global"
    settings = Settings((sparsity,), method, gradient_tokens=QUICK_GRADIENTS)
    name = loaded.identity, f"{text_hash(text)}-{settings.method}", loaded.model.dtype, loaded.model.device
    path = cached_plan(*name, sparsity)
    if path.exists():
        return part_plan(SparsityPlan.load(path), loaded)
    if loaded.team is not None:
        raise ParameterError(
            "{tensor_parallel} {} needs a plan, which one device makes; run calibrate.py --sparsity {} first, or give "
            "{plan} FILE", loaded.team.rank.count, f"{sparsity:g}",
        )  # fmt: skip
    if not can_calibrate:
        raise UserError(
            f"there is no plan for sparsity {sparsity:g} yet; python calibrate.py --sparsity {sparsity:g} makes one"
        )
    print(f"calibrating sparsity {sparsity:g} ({settings.method}) on Python's help topics (once)", file=sys.stderr)
    start = time.perf_counter()
    with floats_kept(loaded.model):
        plan = calibrate_quickly(
            loaded.model, loaded.encode, settings, text, loaded.weights, lambda plans: plans[0].save(path),
            loaded.is_rotated, cached_curves(*name),
        )  # fmt: skip
    plan.save(path)
    loaded.calibrate_s += time.perf_counter() - start
    return plan
