"""A linear layer of a transformer block, as all that handles weights of blocks knows it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer of a block, which may stack several projections of one input along its output.

    Whatever reads, replaces, measures or cuts a block's weights loops over these; see ModelConfig.projections.
    """

    name: str
    module: str  # its place: block.get_submodule(module)
    norm: str  # place of the norm that its sublayer begins with
    input: Literal["normed", "attended", "activated"]  # what makes it: decides which fused kernel can take the product
    in_features: int
    names: tuple[str, ...]  # of what it stacks, in this order
    sizes: tuple[int, ...]  # output channels of each
    hf_names: tuple[str, ...]  # of each, in a layer of a Hugging Face checkpoint
    end: str = ""  # place of what the result of one that ends a sublayer passes before it is added
    bias: bool = False
    unit: int = 1  # neighbouring channels that stay together when it is cut: those of a head

    @property
    def ends_sublayer(self) -> bool:
        """Whether its result is added to the residual stream."""
        return self.input != "normed"

    @property
    def cut(self) -> Literal["output", "input"]:
        """The dimension to cut over devices, in whole units: the outputs of each of names, or the inputs.

        A device's outputs of a sublayer's first layers are its inputs of the last one. The last one's results add up.
        """
        return "input" if self.ends_sublayer else "output"
