"""What the command lines' model options name -> a model with its tokenizer on a device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import load_model, model_identity
from errors import UserError
from hardware import pick_device, pick_dtype
from hf_config import load_config, load_quantization
from int8_cache import use_int8_cache
from model import ModelConfig, Transformer
from params import KV_CACHES
from presets import find_preset, random_model
from quantization import QuantConfig, is_quantized, pick_group_size, use_quantized_linears
from source import resolve_checkpoint
from tokenizer import IdBackend, Tokenizer, load_tokenizer


@dataclass(slots=True)
class Described:
    """What is known of a model before its weights are read; folder is None for random weights."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    folder: Path | None
    is_quantized: bool


Check = Callable[[Described], None]


@dataclass(slots=True)
class LoadedModel:
    """A dense model in eval mode. identity names it by content; folder is where it was read from, if anywhere.

    load_s: seconds that load_for_decoding took; calibrate_s: seconds of quick calibrations since.
    """

    model: Transformer
    tokenizer: Tokenizer
    name: str
    identity: str
    folder: Path | None
    load_s: float = 0.0
    calibrate_s: float = 0.0


def load_for_decoding(
    checkpoint: str | None,
    random_weights: str | None,
    device: str,
    dtype: str,
    sparse: bool,
    quant: str | None = None,
    quant_lm_head: bool = False,
    kv_cache: str = "float",
    check: Check | None = None,
) -> LoadedModel:
    """Load a checkpoint (see source.resolve_checkpoint) or an architecture with random weights.

    sparse says whether the model will run sparse, which decides the faster dtype on a CPU; quant ("int8", "int4")
    rounds the weights of one that is not quantized, and quant_lm_head its output head to 8 bits; kv_cache is one of
    params.KV_CACHES. check may refuse the model, by a UserError, before its weights are read. Raises UserError.
    """
    start = time.perf_counter()
    if quant_lm_head and quant is None:
        raise UserError("--lm-head int8 goes with --quant; to keep the rest in floats is not supported")
    if kv_cache not in KV_CACHES:
        raise UserError(f"--kv-cache {kv_cache}: unknown; expected one of {', '.join(KV_CACHES)}")
    torch_device = pick_device(device)
    described = describe(checkpoint, random_weights)
    if quant is not None:
        check_rounding(described, quant, "--quant")
    if check is not None:
        check(described)
    loaded = _load(described, torch_device, pick_dtype(dtype, torch_device, sparse))
    if quant is not None:
        round_weights(loaded, quant, quant_lm_head, "--quant")
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
    scheme = QuantConfig(quant, pick_group_size(loaded.model.config, None), quant_lm_head, grouping)
    use_quantized_linears(loaded.model, scheme, fill=True)
    loaded.identity += f"-{quant}" + ("-head8" if quant_lm_head else "") + ("-input" if scheme.by_input else "")


def check_rounding(described: Described, quant: str, option: str) -> None:
    """Raise UserError unless the weights of a model can be rounded, as option asks."""
    if described.is_quantized:
        raise UserError(f"{option} {quant}: {described.name} is quantized already; leave the option out")
    pick_group_size(described.config, None)


def describe(checkpoint: str | None, random_weights: str | None) -> Described:
    """The model that these options name, without its weights. Downloads and converts as needed. Raises UserError."""
    if random_weights is not None:
        config = find_preset(random_weights, "--random-weights")
        return Described(random_weights, config, Tokenizer(IdBackend()), None, False)
    folder = resolve_checkpoint(checkpoint)
    config, quantized, tokenizer = load_config(folder), load_quantization(folder) is not None, load_tokenizer(folder)
    if not all(0 <= i < config.vocab_size for i in tokenizer.bos_ids):
        raise UserError(f"{folder}: bos token {tokenizer.bos_ids} is not among the model's {config.vocab_size} tokens")
    return Described(checkpoint or folder.name, config, tokenizer, folder, quantized)


def _load(described: Described, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    name, folder = described.name, described.folder
    if folder is None:
        model = random_model(name, device, dtype)
        return LoadedModel(model, described.tokenizer, name, f"random-{name.lower()}", None)
    model = load_model(folder, device, dtype)
    return LoadedModel(model, described.tokenizer, name, model_identity(folder), folder)
