"""The plugin's quantization config: what vLLM asks for each layer's method."""

import logging
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from teal.errors import UserError
from teal.layers.quantized_linear import QUANT_METHOD, QuantConfig
from teal.model import ModelConfig
from teal.plan import SparsityPlan
from teal.vllm_plugin.achieved import Achieved
from teal.vllm_plugin.linear import TealLinearMethod
from teal.vllm_plugin.places import Place, find_place
from teal.vllm_plugin.product import Shared, most_rows
from teal.vllm_plugin.settings import ENTRY, PluginSettings, architecture, find_plan
from teal.vllm_plugin.vocabulary import TealEmbeddingMethod, TealHeadMethod

logger = logging.getLogger("vllm.teal")


class TealConfig(QuantizationConfig):
    """Of one model: how its weights are rounded, None for floats, and after maybe_update_config its plan, if any."""

    def __init__(self, quant: QuantConfig | None = None) -> None:
        super().__init__()
        self.quant = quant
        self.model: ModelConfig | None = None
        self.settings = PluginSettings()
        self.plan: SparsityPlan | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TealConfig":
        """From a checkpoint's quantization_config, as quantize.py writes it. Raises UserError."""
        return cls(QuantConfig.from_json(config, "config.json"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Find the plan that the checkpoint or the user asks for, before any weight is read.

        vLLM calls it at start-up with the config.json at hand. Raises UserError for a plan or a model that will not do.
        """
        raw = hf_config.to_dict()
        self.model = architecture(model_name, raw)
        if self.quant is not None:
            self.quant.check_fits(self.model)
        self.settings = PluginSettings.from_json(raw.get(ENTRY))
        self.plan = find_plan(self.settings, model_name, self.model)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer holds and multiplies its weight; None leaves it to vLLM.

        Raises UserError for a block's linear layer that is not supported.
        """
        assert self.model is not None, "vLLM calls maybe_update_config before"
        self._start()
        quant = self.quant
        if isinstance(layer, ParallelLMHead):
            return TealHeadMethod(prefix, quant) if quant and quant.lm_head else UnquantizedEmbeddingMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return TealEmbeddingMethod(quant) if quant and quant.embedding else None
        if not isinstance(layer, LinearBase):
            if "moe" in type(layer).__name__.lower() or "expert" in type(layer).__name__.lower():
                raise UserError(f"layer {prefix} of experts is not supported by teal: serve this model without it")
            return None
        place = find_place(self.model, prefix)
        return UnquantizedLinearMethod() if place is None else self._linear_method(prefix, place)

    def _linear_method(self, prefix: str, place: Place) -> TealLinearMethod:
        assert self.model is not None
        refined = 0
        if self.quant is not None and self.quant.is_mixed:
            refined = self.quant.refined[place.block][place.projection]
        if self.plan is None:
            return TealLinearMethod(prefix, [0.0] * len(place.names), -1, self.quant, refined)
        thresholds = [self.plan.layers[place.block][name].threshold for name in place.names]
        p = self.model.projections()[place.projection]
        sizes = [size for name, size in zip(p.names, p.sizes, strict=True) if name in place.names]
        return TealLinearMethod(prefix, thresholds, Shared.achieved.new_counter(sizes), self.quant, refined)

    def _start(self) -> None:
        """Before a model's first layer: forget a former model's layers, log, and untie a head that is rounded."""
        current = get_current_vllm_config()
        if Shared.config is self and Shared.compilation is current.compilation_config:
            return
        Shared.config, Shared.compilation = self, current.compilation_config
        Shared.achieved = Achieved(0.0 if self.plan is None else self.plan.target)
        Shared.sparse_prompts = self.settings.prompts == "sparse"
        bits = "floats" if self.quant is None else self.quant.mode
        if self.plan is None:
            logger.info("teal: weights %s, dense", bits)
        else:
            rows = most_rows(self.quant is not None, "cuda" if torch.cuda.is_available() else "cpu")
            logger.info(
                "teal: weights %s, %g%% sparse (%s) in decode steps of up to %d tokens", bits, 100 * self.plan.target,
                self.plan.method, rows,
            )  # fmt: skip
        if self.quant is not None and self.quant.lm_head:  # else the head's tensors would be skipped
            current.model_config.hf_config.tie_word_embeddings = False
            current.model_config.hf_text_config.tie_word_embeddings = False

    def get_name(self) -> str:
        """As checkpoints and --quantization have it."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Of activations and scales."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of a GPU: Ampere, which the kernels' bf16 asks for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []
