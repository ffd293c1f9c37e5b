"""What a user asks of the plugin, and the plan that answers it. vLLM is not needed to read it.

The entry "teal" of a checkpoint's config.json, or of vLLM's --hf-overrides, is one of

    {"sparsity": 0.5}       the plan teal-0.5.json in the checkpoint's folder
    {"plan": "FILE"}        that plan; with "force_plan": true also one that was made for other weights

and, beside either, "prompts": "sparse" makes prompts as sparse as generated tokens: to score texts as evaluate.py
does. Without a plan all is dense.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from teal.checkpoint.config import parse_config
from teal.checkpoint.identity import stored_weights
from teal.checkpoint.layout import PLAIN
from teal.checkpoint.weights import block_shapes, find_shards, stored_config
from teal.errors import ParameterError, UserError
from teal.model import ModelConfig
from teal.plan import SparsityPlan, check_share, load_fitting_plan, plan_file, plan_name

ENTRY = "teal"  # of config.json
PROMPTS = ("dense", "sparse")
SPELLING = {"force_plan": '"force_plan": true'}  # of parameters that errors name


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """The entry's fields; force_plan: use a plan that was made for other weights."""

    sparsity: float = 0.0
    plan: str | None = None
    force_plan: bool = False
    prompts: str = "dense"

    @classmethod
    def from_json(cls, raw: Any) -> "PluginSettings":
        """Raises UserError, naming the field, for what is not usable."""
        known = [field.name for field in fields(cls)]
        if raw is None:
            return cls()
        if not isinstance(raw, dict):
            raise UserError(f"{ENTRY} {raw!r:.200} is not usable; expected an object of {', '.join(known)}")
        if unknown := sorted(set(raw) - set(known)):
            raise UserError(f"{ENTRY}: {unknown[0]!r:.200} is unknown; expected {', '.join(known)}")
        settings = cls(**raw)
        check_share(settings.sparsity, f"{ENTRY}: sparsity")
        if not isinstance(settings.plan, str | None):
            raise UserError(f"{ENTRY}: plan {settings.plan!r:.200} is not usable; expected a file name")
        if not isinstance(settings.force_plan, bool):
            raise UserError(f"{ENTRY}: force_plan {settings.force_plan!r:.200} is not usable; expected true or false")
        if settings.prompts not in PROMPTS:
            raise UserError(
                f"{ENTRY}: prompts {settings.prompts!r:.200} is not usable; expected {' or '.join(PROMPTS)}"
            )
        if settings.plan is not None and settings.sparsity:
            raise UserError(f"{ENTRY}: plan and sparsity are both given; expected one of them")
        return settings


def architecture(model: str, raw: dict[str, Any]) -> ModelConfig:
    """The architecture of a checkpoint, a folder or a name of the hub, whose config.json holds raw.

    Raises UserError for a family that this project does not know, and for a folder whose tensors vLLM would misread.
    """
    folder = Path(model)
    if raw.get(PLAIN):
        raise UserError(
            f"{model}: {PLAIN} {raw[PLAIN]!r}: this {raw.get('model_type')} model was rotated or rounded into a form "
            "that vLLM misreads; expected the checkpoint that it was made from"
        )
    if not folder.is_dir():
        return parse_config(raw, folder / "config.json")
    if block_shapes(find_shards(folder)):
        raise UserError(f"{folder} holds the blocks of a GGUF file, which vLLM does not read; expected floats")
    return stored_config(folder)


def find_plan(settings: PluginSettings, model: str, config: ModelConfig) -> SparsityPlan | None:
    """The plan that the settings ask for, or None for dense decoding.

    Raises UserError if it is missing, unusable, or made for another model or, in a folder, for other weights.
    """
    folder = Path(model) if Path(model).is_dir() else None
    path = plan_file(folder, settings.sparsity, settings.plan)
    if path is None:
        if settings.sparsity == 0:
            return None
        where = f"there is no {plan_name(settings.sparsity)} in {model}" if folder else f"{model} is no folder"
        raise UserError(
            f"{ENTRY}: sparsity {settings.sparsity:g}: {where}; calibrate.py writes plans, and plan names a file"
        )
    plan = load_fitting_plan(path, config, settings.force_plan)
    if folder is not None and not settings.force_plan:
        try:
            plan.check_weights(stored_weights(folder, folder.name))
        except ParameterError as error:
            raise UserError(f"plan {path}: {error.spelled(lambda name: SPELLING.get(name, name))}") from None
    return plan
