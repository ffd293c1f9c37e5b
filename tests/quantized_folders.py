"""What tests of quantized folders share: the dense model that a folder stands for, and a text's options."""

import shlex
from pathlib import Path

import torch
from torch import nn

from teal.checkpoint.weights import load_model
from teal.layers.quantized_linear import QuantizedLinear
from teal.model import Transformer

# Of generate.py, for a text that two ways to round must both give.
TEXT_OPTIONS = tuple(shlex.split("--device cpu --dtype fp32 --prompt 'The lobster' --max-new-tokens 20 --ignore-eos"))


def dequantized_twin(folder: Path, quantized: Transformer) -> Transformer:
    """The dense model of folder with the weights that quantized stands for."""
    twin, modules = load_model(folder, torch.device("cpu"), torch.float32), dict(quantized.named_modules())
    for name, module in twin.named_modules():
        if isinstance(module, nn.Linear) and isinstance(own := modules[name], QuantizedLinear):
            module.weight = nn.Parameter(own.dequantized().t().contiguous(), requires_grad=False)
    return twin
