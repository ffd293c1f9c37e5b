"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) for groups along the output dimension, one block of a model at a time.

Input channels are rounded one after the other. What rounding one changes in the layer's output is made up for by those
that remain. The scales of an input channel lie in its own row, and follow from the row as it then is. So channels can
go in the order of their importance (the paper's act-order) without regard to groups.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from teal.calibration.stages import BlockStages, Positions, Stream
from teal.checkpoint.config import load_config
from teal.checkpoint.layout import open_shard
from teal.checkpoint.weights import block_targets, hf_projection_names, layer_prefix, projection_targets
from teal.kernels.formats.packing import dequantize
from teal.layers.quantized_linear import Packed, QuantConfig, QuantizedLinear, group_scales, pack, round_groups
from teal.model import Projection, Transformer

LAZY_CHANNELS = 128  # whose changes to later channels are applied together, as one matrix product
DAMPING = 0.01  # of the mean of the diagonal, the paper's value


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int, refined: Tensor | None = None) -> Packed:
    """weight [K, N] -> values, scales (of its dtype), zeros, so that x @ weight changes least.

    hessian: fp32 [K, K], the sum of x^T x over calibration tokens. Channels that no token uses are rounded as they are.
    refined: int [E], of 4 bits, the channels with a second row (kernels/formats/packing.py, 5). Then the result has
    K + E rows, and other channels make up for what both rows leave.
    """
    K, N = weight.shape
    order = _importance(hessian)
    channels = order.tolist()
    extra = {} if refined is None else {channel: K + j for j, channel in enumerate(refined.tolist())}
    shape = K + len(extra), N // group_size
    values = torch.empty(shape[0], N, dtype=torch.uint8 if bits == 4 else torch.int8, device=weight.device)
    scales, zeros = weight.new_empty(shape), torch.empty(shape, dtype=torch.uint8, device=weight.device)

    def round_term(target: Tensor, row: int) -> Tensor:
        groups = target.view(-1, group_size)
        s, z = group_scales(groups, bits, weight.dtype)
        integers = round_groups(groups, s, z, bits)
        values[row], scales[row], zeros[row] = integers.view(N).to(values.dtype), s, z.to(zeros.dtype)
        return ((integers - z[:, None]) * s.float()[:, None]).view(N)

    def round_row(rows: Tensor, k: int) -> Tensor:
        first = round_term(rows[k], channels[k])
        row = extra.get(channels[k])
        return first if row is None else first + round_term(rows[k] - first, row)

    _round_in_order(weight, hessian, order, round_row)
    return pack(values, scales, zeros, bits)


def gptq_input_groups(weight: Tensor, hessian: Tensor, bits: int, group_size: int) -> Packed:
    """As gptq with groups of the usual kind, along the input dimension.

    A group's scales are those of its channels at first (the paper's static groups). For channels go in the order of
    their importance here, too, and those of a group do not follow each other.
    """
    order = _importance(hessian)
    values = torch.empty(weight.shape, dtype=torch.uint8 if bits == 4 else torch.int8, device=weight.device)
    groups = weight.float().t().reshape(weight.shape[1], -1, group_size)  # [N, G, group_size]
    scales, zeros = group_scales(groups, bits, weight.dtype)

    def round_row(rows: Tensor, k: int) -> Tensor:
        s, z = (t[:, order[k] // group_size] for t in (scales, zeros))
        integers = round_groups(rows[k, :, None], s, z, bits)[:, 0]
        values[order[k]] = integers.to(values.dtype)
        return (integers - z) * s.float()

    _round_in_order(weight, hessian, order, round_row)
    return pack(values, scales.t().contiguous(), zeros.t().contiguous(), bits)


def _importance(hessian: Tensor) -> Tensor:
    """Channels by how much of the text's energy they carry, most first (the paper's act-order)."""
    diagonal = hessian.diagonal()
    return diagonal.where(diagonal != 0, 1.0).argsort(descending=True)


def _hessian(inputs: Stream) -> Tensor:
    """The sum of x^T x over all tokens, fp32 [K, K]."""
    K = inputs.parts[0].shape[-1]
    hessian = torch.zeros(K, K, device=inputs.device)
    for part in inputs.parts:
        hessian += part[0].t() @ part[0]
    return hessian


def _round_in_order(
    weight: Tensor, hessian: Tensor, order: Tensor, round_row: Callable[[Tensor, int], Tensor]
) -> None:  # fmt: skip
    """Round channels in order, each as rounding those before it has changed it (the paper's algorithm 1).

    round_row(rows, k): what row k of rows fp32 [K, N], the weight's in that order, is rounded to.
    """
    K, N = weight.shape
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    hessian = hessian[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rows = weight.float()[order]
    for begin in range(0, K, LAZY_CHANNELS):
        end = min(begin + LAZY_CHANNELS, K)
        errors = torch.empty(end - begin, N, device=weight.device)
        for k in range(begin, end):
            error = errors[k - begin] = (rows[k] - round_row(rows, k)) / inverse[k, k]
            rows[k + 1 : end] -= inverse[k, k + 1 : end, None] * error
        rows[end:] -= inverse[begin:end, end:].t() @ errors


class BlockwiseGptq:
    """Quantizes a folder's model block by block, each on what the quantized ones before it make of a text.

    Holds the activations of the text and one block's weights, or the head's, in fp32 on device. sequences: token ids
    [S, L]. where: the file that holds each tensor. refined: the channels with a second row, int32 [E], by the name of a
    projection or the head.
    """

    def __init__(
        self,
        source: Path,
        scheme: QuantConfig,
        sequences: Tensor,
        where: dict[str, Path],
        device: torch.device,
        refined: Mapping[str, Tensor],
    ) -> None:
        self.scheme, self.where, self.device, self.refined = scheme, where, device, refined
        with torch.device("meta"):
            self.model = Transformer(load_config(source)).eval().requires_grad_(False)
        embedding = self._read("model.embed_tokens.weight")
        scale = self.model.config.embedding_factor(embedding.dtype)
        self.stream = Stream([embedding[ids][None].float() * scale for ids in sequences], device, offload=False)
        self.model.norm.to_empty(device=device)  # which tells the model's device and dtype
        self.positions = Positions(self.model, sequences.shape[1])

    def _read(self, name: str) -> Tensor:
        with open_shard(self.where[name]) as tensors:
            return tensors.get_tensor(name)

    def _load(self, i: int, quantized: Path | None = None) -> torch.dtype:
        """Fill block i, in fp32, projections from the shard quantized if given; returns the projections' dtype."""
        block = self.model.blocks[i].to_empty(device=self.device)
        projections = {f"{name}.weight" for name in hf_projection_names(self.model.config)}
        for part, target in block_targets(block).items():
            name = layer_prefix(i) + part
            if name in projections and quantized is not None:
                values = self._read_quantized(quantized, name.removesuffix("weight"))
            else:
                values = self._read(name)
            target.copy_(values)
            if name in projections:
                dtype = values.dtype
        return dtype

    def _read_quantized(self, shard: Path, prefix: str) -> Tensor:
        """The weight [N, K] that the tensors of this prefix stand for."""
        with open_shard(shard) as tensors:
            names = tensors.keys()
            zeros, refined = (
                tensors.get_tensor(prefix + part) if prefix + part in names else None for part in ("zeros", "refined")
            )
            values, scales = (tensors.get_tensor(prefix + part) for part in ("qweight", "scales"))
        return dequantize(values, scales, zeros, refined).t()

    @torch.inference_mode()
    def layer(self, i: int) -> dict[str, Tensor]:
        """The quantized tensors of block i's projections, by name; the text moves on through the quantized block."""
        dtype = self._load(i)
        block, stages = self.model.blocks[i], BlockStages(self.positions, i)
        found: dict[str, Tensor] = {}

        def quantize(p: Projection) -> None:
            inputs, module = stages.inputs(p, self.stream), block.get_submodule(p.module)
            assert isinstance(module, nn.Linear)
            hessian = _hessian(inputs)
            bits, size, weight = self.scheme.bits, self.scheme.group_size, module.weight.t().to(dtype)
            refined = self.refined.get(layer_prefix(i) + p.hf_names[0])
            if self.scheme.by_input:
                packed = gptq_input_groups(weight, hessian, bits, size)
            else:
                packed = gptq(weight, hessian, bits, size, refined)
            holder = self._holder(module, dtype, packed, refined)
            module.weight.copy_(holder.dequantized().t())
            for name, part in projection_targets(holder, dict(zip(p.hf_names, p.sizes, strict=True))).items():
                found[layer_prefix(i) + name] = part.clone(memory_format=torch.contiguous_format).cpu()
            self.stream = stages.after(p, self.stream, inputs)

        for p in block.projections():
            quantize(p)
        block.to_empty(device="meta")
        return found

    @torch.inference_mode()
    def head(self, weight: Tensor, refined: Tensor | None) -> Packed:
        """The head's weight [N, K] in 4 bits, on a CPU. Its inputs are the final norm's results after all blocks."""
        norm = self.model.norm
        for suffix, own in norm.named_parameters():
            own.copy_(self._read(f"model.norm.{suffix}"))
        hessian = _hessian(self.stream.map(norm))
        values, scales, zeros = gptq(weight.t().to(self.device), hessian, 4, self.scheme.group_size, refined)
        assert zeros is not None
        return values.cpu(), scales.cpu(), zeros.cpu()

    def _holder(
        self, module: nn.Linear, dtype: torch.dtype, packed: Packed, refined: Tensor | None
    ) -> QuantizedLinear:  # fmt: skip
        """Of packed, without module's own bias, which the rest of the block goes on to use in fp32."""
        like = nn.Linear(module.in_features, module.out_features, bias=False, device="meta", dtype=dtype)
        count = 0 if refined is None else len(refined)
        holder = QuantizedLinear(like, self.scheme.bits, self.scheme.group_size, self.scheme.by_input, count)
        holder.to_empty(device=self.device).set_weight(*packed, refined if count else None)
        return holder

    @torch.inference_mode()
    def skip(self, i: int, shard: Path) -> None:
        """As layer(i), whose result is in shard already."""
        self._load(i, shard)
        self.stream = self.stream.map(BlockStages(self.positions, i).forward)
        self.model.blocks[i].to_empty(device="meta")
