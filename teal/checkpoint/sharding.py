"""The part of a checkpoint that one rank of several holds (teal/parallel.py): sizes, and slices of tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from teal.checkpoint.awq_gptq import Packing
from teal.errors import ParameterError, UserError
from teal.layers.quantized_linear import QuantConfig
from teal.model import ModelConfig
from teal.parallel import Cut, Rank


def part_config(whole: ModelConfig, rank: Rank) -> ModelConfig:
    """The architecture of a rank's part, with as many tokens as it has rows of embedding and head. Raises UserError."""
    return replace(rank.config(whole), vocab_size=len(rank.vocabulary(whole)))


def check_rank(whole: ModelConfig, rank: Rank, quantized: "QuantConfig | Packing | None", name: str) -> None:
    """Raise UserError unless a checkpoint can be cut for so many ranks: heads, channels, and groups of weights."""
    part = part_config(whole, rank)
    if not isinstance(quantized, QuantConfig):
        return
    if quantized.is_mixed:
        raise ParameterError(
            "{tensor_parallel} {}: {} is in mixed bits, whose second rows belong to single channels; "
            "use one of mode int4 or int8", rank.count, name,
        )  # fmt: skip
    if quantized.lm_head and whole.vocab_size % rank.count:
        raise ParameterError(f"{{tensor_parallel}} {{}} does not divide the {whole.vocab_size} rows of {{}}'s head",
                             rank.count, name)  # fmt: skip
    try:
        quantized.check_fits(part)
    except UserError as error:
        raise ParameterError("{tensor_parallel} {}: {} cannot be cut there: {}", rank.count, name, error) from None


def fills_groups(part: ModelConfig, size: int) -> bool:
    """Whether groups of so many weights fill the projections of a part, along either dimension."""
    return all(n % size == 0 for p in part.projections() for n in (*p.sizes, p.in_features))


def cut_of(name: str, cuts: dict[str, Cut]) -> Cut | None:
    """The cut of a tensor of this name, None of one that every rank has."""
    module = name.rpartition(".")[0]
    if module.startswith("model.layers."):
        module = module.split(".", 3)[-1]
    return cuts.get(module)


def cut_tensor(values: Tensor, cut: Cut, name: str, like: Tensor) -> Tensor:
    """A rank's part of a stored tensor of this name: a view, so that a mapped file is read no further.

    Floats and embeddings lie output first, other weights input first. Of a bias where inputs are cut, the first rank
    adds all and the others zeros. like has the shape that is wanted: rows beyond the vocabulary's end are zeros.
    """
    module, _, part = name.rpartition(".")
    if part == "bias" and cut.along == "input":
        return values if cut.start == 0 else torch.zeros_like(values)
    by_output = part in ("weight", "bias") or module.endswith("embed_tokens")
    dim = 0 if by_output == (cut.along == "output") else 1
    per_entry, left = divmod(cut.total, values.shape[dim])  # channels to a word, or to a scale
    if left or cut.start % per_entry or (cut.stop - cut.start) % per_entry:
        raise UserError(f"{tuple(values.shape)} cannot be cut at channel {cut.start}: {per_entry} belong together")
    found = values.narrow(dim, cut.start // per_entry, max(0, cut.stop - cut.start) // per_entry)
    if found.shape == like.shape:
        return found
    padded = torch.zeros(like.shape, dtype=found.dtype)
    padded[: len(found)] = found
    return padded
