"""ModelOptions -> a model with its tokenizer on a device."""

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from teal.checkpoint.config import load_config, load_quantization
from teal.checkpoint.identity import model_identity, stored_weights
from teal.checkpoint.presets import find_preset, random_model
from teal.checkpoint.rotation import rotation_record
from teal.checkpoint.source import name_for_people, resolve_checkpoint
from teal.checkpoint.token_backends import IdBackend
from teal.checkpoint.tokenizer import Tokenizer, load_tokenizer
from teal.checkpoint.weights import load_model
from teal.errors import ParameterError, UserError
from teal.hardware import pick_device, pick_dtype
from teal.kernels.cpu.native import native_kernels
from teal.layers.int8_cache import has_int8_cache, use_int8_cache
from teal.layers.output_head import use_native_head
from teal.layers.quantized_linear import BITS, is_quantized, pick_group_size
from teal.layers.rounding import quantize
from teal.layers.team import Team, join_team, share
from teal.layers.wide_linear import use_wide_linears
from teal.model import ModelConfig, OutputHead, Transformer
from teal.options import DraftOptions, ModelOptions, unknown_id
from teal.parallel import Rank
from teal.plan import SparsityPlan, Weights, config_fields, load_fitting_plan, plan_file


@dataclass(slots=True)
class Described:
    """What is known of a model before its weights are read; folder is None for random weights.

    is_rotated: whether a text of calibration may be the one that its rotation was found on.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    folder: Path | None
    is_quantized: bool
    is_rotated: bool = False

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises UserError if the model lacks one."""
        return _known(self.tokenizer.encode(text), self.config, self.name)


Check = Callable[[Described], None]


@dataclass(slots=True)
class LoadedModel:
    """A dense model in eval mode. identity names it by content; folder is where it was read from, if anywhere.

    weights: what plans know it by, None if a quantized checkpoint does not say. load_s: seconds that load_for_decoding
    took; calibrate_s: those of quick calibrations since. force_plan: take plans of other models, too. dtype_reason: why
    it computes in its dtype. is_rotated: as in Described. config and team: of a model that several ranks share.
    """

    model: Transformer
    tokenizer: Tokenizer
    name: str
    identity: str
    folder: Path | None
    weights: Weights | None
    load_s: float = 0.0
    force_plan: bool = False
    calibrate_s: float = 0.0
    dtype_reason: str = ""
    is_rotated: bool = False
    config: ModelConfig | None = None  # of the whole model, where this one is a rank's part
    team: Team | None = None

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises UserError if the model lacks one."""
        return _known(self.tokenizer.encode(text), self.config or self.model.config, self.name)


def _known(ids: list[int], config: ModelConfig, name: str) -> list[int]:
    if (token := unknown_id(ids, config.vocab_size)) is not None:
        raise UserError(
            f"{name}: its tokenizer gives token {token}, and its weights have {config.vocab_size} tokens; "
            "the tokenizer is another model's"
        )
    return ids


def load_for_decoding(options: ModelOptions, check: Check | None = None, *, sparse: bool | None = None) -> LoadedModel:
    """Load the model that options name, dense, with the weights and the cache that they ask for.

    check may refuse the model, by a UserError, before its weights are read. sparse says whether the model will run
    sparse, None that options do: it decides the faster dtype on a CPU. options.threads holds for the whole process from
    now on. Raises UserError.
    """
    start = time.perf_counter()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    described = describe(options.checkpoint, options.random_weights, options.adapter)
    check_fit(options, described)
    if check is not None:
        check(described)
    team = join_team(options.tensor_parallel, device, described.config) if options.tensor_parallel > 1 else None
    if team is not None:
        device = team.device
        if device.type == "cpu" and options.threads is None:  # the ranks share the cores
            torch.set_num_threads(max(1, torch.get_num_threads() // team.rank.count))
    choice = pick_dtype(options.dtype, device, options.is_sparse if sparse is None else sparse)
    rank = None if team is None else team.rank
    loaded = _load(described, device, choice.dtype, _keeps_integers(options, device), rank, options)
    loaded.dtype_reason = choice.reason
    use_native_head(loaded.model)
    if options.quant is not None and described.folder is not None:
        round_weights(loaded, options.quant, options.quant_lm_head)
    if options.kv_cache == "int8":
        use_int8_cache(loaded.model)
    if team is not None:
        loaded.config, loaded.team = described.config, team
        share(loaded.model, team, described.config)
    use_wide_linears(loaded.model)
    loaded.force_plan = options.force_plan
    _release_freed_memory()
    loaded.load_s = time.perf_counter() - start
    return loaded


def _release_freed_memory() -> None:
    """Give the system back what was freed, where glibc keeps it: 100 MB after a large tokenizer was read."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _keeps_integers(options: ModelOptions, device: torch.device) -> bool:
    """Whether a GGUF file's integers stay: on a CPU by compiled kernels, which torch.compile cannot take."""
    if options.dequantize or options.quant is not None:
        return False
    if device.type != "cpu":
        return True
    return not options.compile and options.backend in ("auto", "eager", "program") and native_kernels() is not None


def round_weights(
    loaded: LoadedModel, quant: str, quant_lm_head: str | None, parameter: str = "quant", grouping: str = "output"
) -> None:
    """Round the weights of loaded to "int8" or "int4" in place, and those of the output head if asked to.

    parameter is the one that asks for it. Raises UserError if they are rounded by now.
    """
    if is_quantized(loaded.model):
        raise _rounded_already(parameter, quant, loaded.name)
    quantize(loaded.model, quant, None, quant_lm_head, grouping)
    loaded.identity += _rounding_name(quant, quant_lm_head) + ("-input" if grouping == "input" else "")


def _rounding_name(quant: str, quant_lm_head: str | None) -> str:
    """What the identity of a model ends with whose weights are rounded at load."""
    return f"-{quant}" + ("" if quant_lm_head is None else f"-head{BITS[quant_lm_head]}")


def check_fit(options: ModelOptions, model: Described) -> None:
    """Raise UserError unless a model's weights can be rounded as options ask, and the plan that they name is for it."""
    if options.quant is not None:
        _check_rounding(model, "quant", options.quant, options.quant_lm_head is not None)
    _check_plan(model, options.sparsity, options.plan, options.force_plan)


def check_draft_fit(draft: DraftOptions, model: Described, force_plan: bool) -> None:
    """Raise UserError unless the model can draft as asked: see check_fit."""
    if draft.lookup:
        return
    if draft.quant is not None:
        _check_rounding(model, "draft_quant", draft.quant, with_head=True)
    if draft.checkpoint is not None:
        model = _described_draft(draft.checkpoint, model)
    _check_plan(model, draft.sparsity, draft.plan, force_plan)


def _described_draft(checkpoint: str, model: Described) -> Described:
    """The checkpoint that drafts for model. Raises UserError unless it was rounded from model's weights."""
    draft = describe(checkpoint)
    assert draft.folder is not None
    if not draft.is_quantized:
        raise ParameterError("{draft_checkpoint} {}: is not quantized; give a folder of quantize.py", checkpoint)
    its = stored_weights(draft.folder, draft.folder.name)
    own = None if model.folder is None else stored_weights(model.folder, model.folder.name)
    if its is None or own is None or its.identity != own.identity:
        raise ParameterError(
            "{draft_checkpoint} {}: was made from {}, not from {}, whose keys and values it would share; quantize that",
            checkpoint, its or "unnamed weights", own or model.name,
        )  # fmt: skip
    return draft


def load_draft(checkpoint: str, target: LoadedModel) -> LoadedModel:
    """A checkpoint that check_draft_fit let pass, in the device, dtype and cache of the model that it drafts for.

    Embedding and, if neither is rounded, head are target's: both were made from the same weights. Raises UserError.
    """
    model = target.model
    loaded = _load(describe(checkpoint), model.device, model.dtype)
    loaded.model.embedding = model.embedding
    if isinstance(model.lm_head, OutputHead) and isinstance(loaded.model.lm_head, OutputHead):
        loaded.model.lm_head = model.lm_head
    if has_int8_cache(model):
        use_int8_cache(loaded.model)
    use_wide_linears(loaded.model)
    loaded.force_plan = target.force_plan
    return loaded


def _check_rounding(model: Described, parameter: str, quant: str, with_head: bool) -> None:
    if model.is_quantized:
        raise _rounded_already(parameter, quant, model.name)
    pick_group_size(model.config, None, with_head)


def _rounded_already(parameter: str, quant: str, name: str) -> ParameterError:
    return ParameterError(f"{{{parameter}}} {{}}: {{}} is quantized already; leave the option out", quant, name)


def _check_plan(model: Described, sparsity: float, plan: str | None, force_plan: bool) -> None:
    if (path := plan_file(model.folder, sparsity, plan)) is not None:
        load_fitting_plan(path, model.config, force_plan)


def describe(checkpoint: str | None, random_weights: str | None = None, adapter: str | None = None) -> Described:
    """The model that these options name, without its weights. Downloads and converts as needed. Raises UserError."""
    if random_weights is not None:
        return Described(random_weights, find_preset(random_weights), Tokenizer(IdBackend()), None, False)
    folder = resolve_checkpoint(checkpoint, adapter)
    config, quantized, tokenizer = load_config(folder), load_quantization(folder) is not None, load_tokenizer(folder)
    if not all(0 <= i < config.vocab_size for i in tokenizer.bos_ids):
        raise UserError(f"{folder}: bos token {tokenizer.bos_ids} is not among the model's {config.vocab_size} tokens")
    rotated = rotation_record(folder) is not None
    name = name_for_people(folder, checkpoint, adapter)
    return Described(name, config, tokenizer, folder, quantized, rotated)


def _load(
    described: Described, device: torch.device, dtype: torch.dtype, keep_integers: bool = False,
    rank: Rank | None = None, options: ModelOptions = ModelOptions(),
) -> LoadedModel:  # fmt: skip
    """A described model. Random weights are made as options round them; those of a folder are read as they are."""
    name, folder = described.name, described.folder
    if folder is None:
        model = random_model(name, device, dtype, rank, options.quant, options.quant_lm_head)
        identity = f"random-{name.lower()}"
        own = "" if options.quant is None else _rounding_name(options.quant, options.quant_lm_head)
        return LoadedModel(model, described.tokenizer, name, identity + own, None, Weights(name, identity))
    model = load_model(folder, device, dtype, keep_integers, rank)
    weights = stored_weights(folder, Path(name).resolve().name)
    identity = model_identity(folder)
    return LoadedModel(model, described.tokenizer, name, identity, folder, weights, is_rotated=described.is_rotated)


def part_plan(plan: SparsityPlan, loaded: LoadedModel) -> SparsityPlan:
    """A plan of the whole model, of which loaded may be a rank's part: its thresholds are the same."""
    return plan if loaded.config is None else replace(plan, model=config_fields(loaded.model.config))


def load_plan(path: Path, loaded: LoadedModel) -> SparsityPlan:
    """The plan in a file for a model in memory. Raises UserError if it was made for another, unless loaded.force_plan.

    Where plan or checkpoint do not say for which weights, shapes are compared and a line on stderr says so.
    """
    plan = load_fitting_plan(path, loaded.config or loaded.model.config, loaded.force_plan)
    plan = part_plan(plan, loaded)
    try:
        plan.check_weights(loaded.weights)
    except UserError as error:
        raise ParameterError("plan {}: {}", path, error) from None
    if not loaded.force_plan and (plan.weights is None or loaded.weights is None):
        silent = f"plan {path}" if plan.weights is None else loaded.name
        print(f"{silent} does not say which weights it was made from; only shapes are compared", file=sys.stderr)
    return plan
