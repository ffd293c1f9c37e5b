"""Round a model's weights in memory, as quantize.py does those of a folder: `from teal import quantize`."""

from teal.errors import UserError
from teal.layers.block_linear import widen_blocks
from teal.layers.quantized_embedding import use_quantized_modules
from teal.layers.quantized_linear import BITS, QuantConfig, is_quantized, pick_group_size
from teal.model import ModelConfig, Transformer
from teal.options import QUANTS, check_choice
from teal.teal_layers import sparse_layers


def quantize(
    model: Transformer,
    mode: str = "int4",
    group_size: int | None = None,
    lm_head: str | None = None,
    grouping: str = "output",
    embedding: bool = False,
) -> Transformer:
    """Round the projections of every block to nearest, in place, and return the model.

    Each nn.Linear [N, K] becomes a QuantizedLinear: integers [K, N] in 8 or 4 bits, scales in the weight's dtype.
    mode: "int8" (symmetric) or "int4" (with zero points). group_size: weights to a scale; None takes the largest of
    128, 64 and 32 that divides every width. lm_head: round the output head too, to "int8" or "int4", in groups along
    the output. grouping: "output" keeps a group within one input channel, "input" is the usual kind. embedding: round
    it too, to 8 bits; a head that is tied to it must be rounded then.

    Weights in a GGUF file's own integers become floats before. To combine it with sparsity, quantize first and sparsify
    then. Raises UserError for an unknown mode, head or grouping, and for a group size that does not divide the widths.
    So it does for a model that is quantized or sparse already.
    """
    if any(sparse_layers(model)):
        raise UserError("the model is sparse already; quantize it first, then sparsify it")
    if is_quantized(model):
        raise UserError("the model is quantized already; start from its original weights")
    check_choice("mode", mode, QUANTS)
    if lm_head is not None:
        check_choice("lm_head", lm_head, QUANTS)
    scheme = scheme_of(model.config, mode, group_size, lm_head, grouping, embedding)
    scheme.check_embedding(model.config)
    widen_blocks(model)
    use_quantized_modules(model, scheme, fill=True)
    return model


def scheme_of(
    config: ModelConfig, mode: str, group_size: int | None = None, lm_head: str | None = None,
    grouping: str = "output", embedding: bool = False,
) -> QuantConfig:  # fmt: skip
    """How quantize rounds a model of config. Raises UserError for a group size that does not divide its widths."""
    has_head = lm_head is not None
    size = pick_group_size(config, group_size, has_head)
    return QuantConfig(mode, size, has_head, grouping, embedding, head_bits=BITS[lm_head or "int8"])
