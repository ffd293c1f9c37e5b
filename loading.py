"""What the command lines' model options name -> a model with its tokenizer on a device."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoint import load_model, model_identity, stored_weights
from errors import UserError
from hardware import pick_device, pick_dtype
from int8_cache import use_int8_cache
from model import Transformer
from params import KV_CACHES
from plan import SparsityPlan, Weights
from presets import random_model
from quantization import QuantConfig, is_quantized, pick_group_size, use_quantized_linears
from source import resolve_checkpoint
from token_backends import IdBackend
from tokenizer import Tokenizer, load_tokenizer


@dataclass(slots=True)
class LoadedModel:
    """A dense model in eval mode. identity names it by content; folder is where it was read from, if anywhere.

    weights: what plans know it by, None if a quantized checkpoint does not say. load_s: seconds that load_for_decoding
    took. force_plan: take plans of other models, too.
    """

    model: Transformer
    tokenizer: Tokenizer
    name: str
    identity: str
    folder: Path | None
    weights: Weights | None
    load_s: float = 0.0
    force_plan: bool = False


def load_for_decoding(
    checkpoint: str | None,
    random_weights: str | None,
    device: str,
    dtype: str,
    sparse: bool,
    quant: str | None = None,
    quant_lm_head: bool = False,
    kv_cache: str = "float",
    force_plan: bool = False,
) -> LoadedModel:
    """Load a checkpoint (see source.resolve_checkpoint) or an architecture with random weights.

    sparse says whether the model will run sparse, which decides the faster dtype on a CPU; quant ("int8", "int4")
    rounds the weights of one that is not quantized, and quant_lm_head its output head to 8 bits; kv_cache is one of
    params.KV_CACHES; force_plan is kept for load_plan. Raises UserError.
    """
    start = time.perf_counter()
    loaded = _load(checkpoint, random_weights, device, dtype, sparse)
    if quant_lm_head and quant is None:
        raise UserError("--lm-head int8 goes with --quant; to keep the rest in floats is not supported")
    if quant is not None:
        round_weights(loaded, quant, quant_lm_head, "--quant")
    if kv_cache not in KV_CACHES:
        raise UserError(f"--kv-cache {kv_cache}: unknown; expected one of {', '.join(KV_CACHES)}")
    if kv_cache == "int8":
        use_int8_cache(loaded.model)
    loaded.force_plan = force_plan
    loaded.load_s = time.perf_counter() - start
    return loaded


def round_weights(
    loaded: LoadedModel, quant: str, quant_lm_head: bool, option: str, grouping: str = "output"
) -> None:  # fmt: skip
    """Round the weights of loaded to "int8" or "int4" in place; option named it. Raises UserError if they are by now."""
    if is_quantized(loaded.model):
        raise UserError(f"{option} {quant}: {loaded.name} is quantized already; leave the option out")
    scheme = QuantConfig(quant, pick_group_size(loaded.model.config, None), quant_lm_head, grouping)
    use_quantized_linears(loaded.model, scheme, fill=True)
    loaded.identity += f"-{quant}" + ("-head8" if quant_lm_head else "") + ("-input" if scheme.by_input else "")


def _load(checkpoint: str | None, random_weights: str | None, device: str, dtype: str, sparse: bool) -> LoadedModel:
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device, sparse)
    if random_weights is not None:
        model = random_model(random_weights, torch_device, torch_dtype)
        name = random_weights
        identity = f"random-{name.lower()}"
        return LoadedModel(model, Tokenizer(IdBackend()), name, identity, None, Weights(name, identity))
    folder = resolve_checkpoint(checkpoint)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch_device, torch_dtype)
    name = checkpoint or folder.name
    weights = stored_weights(folder, Path(name).resolve().name)
    return LoadedModel(model, tokenizer, name, model_identity(folder), folder, weights)


def load_plan(path: Path, loaded: LoadedModel) -> SparsityPlan:
    """The plan in a file for a model in memory. Raises UserError if it was made for another one, unless loaded.force_plan.

    Where plan or checkpoint do not say for which weights, shapes are compared and a line on stderr says so.
    """
    plan = SparsityPlan.load(path)
    known = plan.weights is not None and loaded.weights is not None
    if loaded.force_plan:
        plan, known = plan.for_any_model(), True
    try:
        plan.check_fits(loaded.model.config)
        plan.check_weights(loaded.weights)
    except UserError as error:
        raise UserError(f"plan {path}: {error}") from None
    if not known:
        silent = f"plan {path}" if plan.weights is None else loaded.name
        print(f"{silent} does not say which weights it was made from; only shapes are compared", file=sys.stderr)
    return plan
