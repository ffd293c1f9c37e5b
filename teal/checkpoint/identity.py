"""What names a checkpoint by its content, whatever it is called and however it is split into files."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from teal.checkpoint.config import load_config, read_json
from teal.checkpoint.layout import open_shard
from teal.checkpoint.weights import find_shards
from teal.errors import UserError
from teal.layers.quantized_linear import QUANT_METHOD
from teal.model import ModelConfig
from teal.plan import Weights

HASHED_ROWS = 4  # of a matrix


def config_hash(config: ModelConfig) -> str:
    """16 hex digits that name an architecture: equal for models whose plans are interchangeable in shape."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def model_identity(folder: Path) -> str:
    """16 hex digits that name the model in folder by content: its architecture and its weights."""
    parts = config_hash(load_config(folder)) + weights_identity(folder)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def weights_identity(folder: Path) -> str:
    """16 hex digits that name the weights in folder by content, however they are split into files.

    A few rows of each tensor are hashed, and all of a vector: whole models take too long. A fine-tune, also one that
    was merged into some projections only, changes all rows of a tensor. A change of single rows may go unseen.
    """
    digests: dict[str, bytes] = {}
    for shard in find_shards(folder):
        with open_shard(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                stored = tensors.get_slice(name)
                shape = stored.get_shape()
                digest = hashlib.sha256(f"{name} {stored.get_dtype()} {shape}".encode())
                if len(shape) > 1:
                    places = [(shape[0] - 1) * i // (HASHED_ROWS - 1) for i in range(HASHED_ROWS)]
                    sample = torch.cat([stored[i : i + 1] for i in places])
                else:
                    sample = tensors.get_tensor(name)
                digest.update(sample.reshape(-1).view(torch.uint8).numpy().tobytes())
                digests[name] = digest.digest()
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()[:16]


def stored_weights(folder: Path, name: str) -> Weights | None:
    """The weights in folder, called name, as plans know them; those that quantize.py rounded are its source's.

    None if it did not record them yet. Raises UserError.
    """
    raw = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
        return Weights(name, weights_identity(folder))
    source = raw.get("source")
    try:
        return None if source is None else Weights(**source)
    except (TypeError, UserError) as error:
        raise UserError(f"{folder / 'config.json'}: quantization_config: source: {error}") from None
