"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) for groups along the output dimension, one block of a model at a time.

Input channels are rounded one after the other, and what rounding one changes in the layer's output is made up for by
those that remain. With scales of an input channel in its own row, each channel's scales follow from the row as it then
is, and channels can go in the order of their importance (the paper's act-order) without regard to groups.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration import BlockStages
from checkpoint import open_shard, projection_targets, weight_targets
from hf_config import load_config
from kernels.packing import dequantize, pack_int4
from model import Block, Transformer
from quantization import QuantConfig, QuantizedLinear, group_scales, round_groups

LAZY_CHANNELS = 128  # whose changes to later channels are applied together, as one matrix product
DAMPING = 0.01  # of the mean of the diagonal, the paper's value
Packed = tuple[Tensor, Tensor, Tensor | None]


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Packed:
    """weight [K, N] -> values, scales (of its dtype), zeros, so that x @ weight changes least.

    hessian: fp32 [K, K], the sum of x^T x over calibration tokens. Channels that no token uses are rounded as they are.
    """
    K, N = weight.shape
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    order = diagonal.argsort(descending=True)
    diagonal += DAMPING * diagonal.mean()
    hessian = hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rows = weight.float()[order]
    values = torch.empty(K, N, dtype=torch.uint8 if bits == 4 else torch.int8, device=weight.device)
    scales = weight.new_empty(K, N // group_size)
    zeros = torch.empty(K, N // group_size, dtype=torch.uint8, device=weight.device)
    for begin in range(0, K, LAZY_CHANNELS):
        end = min(begin + LAZY_CHANNELS, K)
        errors = torch.empty(end - begin, N, device=weight.device)
        for k in range(begin, end):
            groups = rows[k].view(-1, group_size)
            s, z = group_scales(groups, bits, weight.dtype)
            integers = round_groups(groups, s, z, bits)
            values[order[k]], scales[order[k]], zeros[order[k]] = (
                integers.view(N).to(values.dtype),
                s,
                z.to(zeros.dtype),
            )
            rounded = ((integers - z[:, None]) * s.float()[:, None]).view(N)
            error = errors[k - begin] = (rows[k] - rounded) / inverse[k, k]
            rows[k + 1 : end] -= inverse[k, k + 1 : end, None] * error
        rows[end:] -= inverse[begin:end, end:].t() @ errors
    return (values, scales, None) if bits == 8 else (pack_int4(values, group_size), scales, zeros)


class BlockwiseGptq:
    """Quantizes the blocks of the model in a folder in order, each on what the quantized ones before it make of a text.

    Holds the activations of the text and one block's weights, in fp32 on device. sequences: token ids [S, L]; where: the
    file that holds each tensor.
    """

    def __init__(
        self, source: Path, scheme: QuantConfig, sequences: Tensor, where: dict[str, Path], device: torch.device
    ) -> None:
        self.scheme, self.where, self.device = scheme, where, device
        with torch.device("meta"):
            self.model = Transformer(load_config(source)).eval().requires_grad_(False)
        embedding = self._read("model.embed_tokens.weight")
        self.stream = [embedding[ids][None].float().to(device) for ids in sequences]
        tells_device_and_dtype = torch.empty(1, 1, device=device)
        self.model.embedding.weight = nn.Parameter(tells_device_and_dtype, requires_grad=False)

    def _read(self, name: str) -> Tensor:
        with open_shard(self.where[name]) as tensors:
            return tensors.get_tensor(name)

    def _load(self, i: int) -> Block:
        """Block i in fp32."""
        block = self.model.blocks[i].to_empty(device=self.device)
        prefix = f"model.layers.{i}."
        for name, tensor in weight_targets(self.model).items():
            if name.startswith(prefix):
                tensor.copy_(self._read(name))
        return block

    @torch.inference_mode()
    def layer(self, i: int) -> dict[str, Tensor]:
        """The quantized tensors of block i's projections, by name; the text moves on through the quantized block."""
        block = self._load(i)
        stages = BlockStages(self.model, i, self.stream[0].shape[1])
        attention, feed_forward = block.attention, block.feed_forward
        c = self.model.config
        found: dict[str, Tensor] = {}

        def quantize(module: nn.Linear, inputs: Callable[[Tensor], Tensor], sizes: dict[str, int]) -> None:
            dtype = self._read(f"model.layers.{i}.{next(iter(sizes))}.weight").dtype
            hessian = torch.zeros(module.in_features, module.in_features, device=self.device)
            for x in self.stream:
                rows = inputs(x)[0]
                hessian += rows.t() @ rows
            packed = gptq(module.weight.t().to(dtype), hessian, self.scheme.bits, self.scheme.group_size)
            module.weight.copy_(dequantize(*packed).t())
            holder = QuantizedLinear(module, self.scheme.bits, self.scheme.group_size).to(dtype)
            holder.set_weight(*packed)
            for name, part in projection_targets(holder, sizes).items():
                if not name.endswith(".bias"):  # which is no matter of quantization
                    found[f"model.layers.{i}.{name}"] = part.contiguous().cpu()

        sizes = {"self_attn.q_proj": c.q_size, "self_attn.k_proj": c.kv_size, "self_attn.v_proj": c.kv_size}
        quantize(attention.wqkv, block.attention_norm, sizes)
        mixed = {id(x): stages.attention_output(x) for x in self.stream}
        quantize(attention.wo, lambda x: mixed[id(x)], {"self_attn.o_proj": c.hidden_size})
        self.stream = [stages.after_attention(x, mixed[id(x)]) for x in self.stream]
        sizes = {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}
        quantize(feed_forward.gate_up, block.ffn_norm, sizes)
        hidden = {id(x): stages.hidden(x) for x in self.stream}
        quantize(feed_forward.down, lambda x: hidden[id(x)], {"mlp.down_proj": c.hidden_size})
        self.stream = [stages.output(x, hidden[id(x)]) for x in self.stream]
        block.to_empty(device="meta")
        return found

    @torch.inference_mode()
    def skip(self, i: int, shard: Path) -> None:
        """As layer(i), whose result is in shard already."""
        block = self._load(i)
        with open_shard(shard) as tensors:
            for name, target in weight_targets(self.model).items():
                if name.startswith(f"model.layers.{i}.") and name.endswith("_proj.weight"):
                    prefix = name.removesuffix("weight")
                    zeros = tensors.get_tensor(prefix + "zeros") if self.scheme.bits == 4 else None
                    values, scales = (tensors.get_tensor(prefix + part) for part in ("qweight", "scales"))
                    target.copy_(dequantize(values, scales, zeros).t())
        stages = BlockStages(self.model, i, self.stream[0].shape[1])
        self.stream = [stages.forward(x) for x in self.stream]
        block.to_empty(device="meta")
