"""An embedding in 8 bits: a token's vector is a row of a weight [V, C] with groups along it (packing.py, 1 and 3).

The layout is that of a projection with a token for each input channel. A step reads the rows of its tokens alone, so
rounding an embedding saves memory and no time.
"""

import torch
from torch import Tensor, nn

from teal.layers.quantized_linear import QuantConfig, round_to_nearest, use_quantized_linears
from teal.model import Transformer


class QuantizedEmbedding(nn.Module):
    """nn.Embedding with int8 weight [V, C] and scales [V, C / group_size]; unset until loading or round fills them."""

    def __init__(self, embedding: nn.Embedding, group_size: int) -> None:
        super().__init__()
        (V, C), like = embedding.weight.shape, embedding.weight
        self.weight = nn.Parameter(like.new_empty(V, C, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(like.new_empty(V, C // group_size), requires_grad=False)

    def round(self, weight: Tensor) -> None:
        """Take floats [V, C], rounded to nearest."""
        values, scales, _ = round_to_nearest(weight, 8, weight.shape[1] // self.scales.shape[1])
        self.weight.copy_(values)
        self.scales.copy_(scales)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [...] -> fp32 [..., C]."""
        return vectors(self.weight, self.scales, tokens)


def vectors(weight: Tensor, scales: Tensor, tokens: Tensor) -> Tensor:
    """The vectors of tokens int64 [...] in such a weight int8 [V, C] with scales [V, C / group_size]: fp32 [..., C]."""
    factors = scales[tokens].float()
    groups = weight[tokens].unflatten(-1, (factors.shape[-1], -1))
    return (groups * factors.unsqueeze(-1)).flatten(-2)


def use_quantized_modules(model: Transformer, config: QuantConfig, fill: bool = False) -> None:
    """As use_quantized_linears; and the embedding, if config says so."""
    use_quantized_linears(model, config, fill)
    if not config.embedding:
        return
    embedding = QuantizedEmbedding(model.embedding, config.group_size)
    if fill:
        embedding.round(model.embedding.weight)
    model.embedding = embedding  # type: ignore[assignment]
