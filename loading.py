"""What the command lines' model options name -> a model with its tokenizer on a device."""

import time
from dataclasses import dataclass
from pathlib import Path

from checkpoint import load_model, model_identity
from errors import UserError
from hardware import pick_device, pick_dtype
from int8_cache import use_int8_cache
from model import Transformer
from output_head import use_native_head
from params import KV_CACHES
from presets import random_model
from quantization import QuantConfig, is_quantized, pick_group_size, use_quantized_linears
from source import resolve_checkpoint
from tokenizer import IdBackend, Tokenizer, load_tokenizer


@dataclass(slots=True)
class LoadedModel:
    """A dense model in eval mode. identity names it by content; folder is where it was read from, if anywhere.

    load_s: seconds that load_for_decoding took; dtype_reason: why it computes in its dtype.
    """

    model: Transformer
    tokenizer: Tokenizer
    name: str
    identity: str
    folder: Path | None
    load_s: float = 0.0
    dtype_reason: str = ""


def load_for_decoding(
    checkpoint: str | None,
    random_weights: str | None,
    device: str,
    dtype: str,
    sparse: bool,
    quant: str | None = None,
    quant_lm_head: bool = False,
    kv_cache: str = "float",
) -> LoadedModel:
    """Load a checkpoint (see source.resolve_checkpoint) or an architecture with random weights.

    sparse says whether the model will run sparse, which decides the faster dtype on a CPU; quant ("int8", "int4")
    rounds the weights of one that is not quantized, and quant_lm_head its output head to 8 bits; kv_cache is one of
    params.KV_CACHES. Raises UserError.
    """
    start = time.perf_counter()
    loaded = _load(checkpoint, random_weights, device, dtype, sparse)
    use_native_head(loaded.model)
    if quant_lm_head and quant is None:
        raise UserError("--lm-head int8 goes with --quant; to keep the rest in floats is not supported")
    if quant is not None:
        round_weights(loaded, quant, quant_lm_head, "--quant")
    if kv_cache not in KV_CACHES:
        raise UserError(f"--kv-cache {kv_cache}: unknown; expected one of {', '.join(KV_CACHES)}")
    if kv_cache == "int8":
        use_int8_cache(loaded.model)
    loaded.load_s = time.perf_counter() - start
    return loaded


def round_weights(
    loaded: LoadedModel, quant: str, quant_lm_head: bool, option: str, grouping: str = "output"
) -> None:  # fmt: skip
    """Round the weights of loaded to "int8" or "int4" in place; option named it. Raises UserError if they are by now."""
    if is_quantized(loaded.model):
        raise UserError(f"{option} {quant}: {loaded.name} is quantized already; leave the option out")
    scheme = QuantConfig(quant, pick_group_size(loaded.model.config, None, quant_lm_head), quant_lm_head, grouping)
    use_quantized_linears(loaded.model, scheme, fill=True)
    loaded.identity += f"-{quant}" + ("-head8" if quant_lm_head else "") + ("-input" if scheme.by_input else "")


def _load(checkpoint: str | None, random_weights: str | None, device: str, dtype: str, sparse: bool) -> LoadedModel:
    torch_device = pick_device(device)
    choice = pick_dtype(dtype, torch_device, sparse)
    if random_weights is not None:
        model, name = random_model(random_weights, torch_device, choice.dtype), random_weights
        identity = f"random-{name.lower()}"
        return LoadedModel(model, Tokenizer(IdBackend()), name, identity, None, dtype_reason=choice.reason)
    folder = resolve_checkpoint(checkpoint)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch_device, choice.dtype)
    name, identity = checkpoint or folder.name, model_identity(folder)
    return LoadedModel(model, tokenizer, name, identity, folder, dtype_reason=choice.reason)
