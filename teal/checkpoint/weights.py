"""Hugging Face folder -> Transformer on a device: safetensors read by mmap, one tensor at a time.

Nothing is converted on disk. Each tensor goes straight from the mapped file into its place in the model, a projection
into its rows of a stacked weight. So host memory holds at most the pages of one shard beside the model itself. All
names, shapes and dtypes are checked before the first byte is copied. Pickle files are never read: loading one can run
code.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from teal.checkpoint.awq_gptq import Packing
from teal.checkpoint.blocks import GROUP_PARTS, GROUP_TYPES, Form, map_blocks, use_block_modules
from teal.checkpoint.config import load_config, load_quantization
from teal.checkpoint.fields import read_json
from teal.checkpoint.layout import open_shard, read_layout
from teal.checkpoint.sharding import check_rank, cut_of, cut_tensor, fills_groups, part_config
from teal.errors import ParameterError, UserError
from teal.kernels.formats.blocks import MIN_GROUP
from teal.kernels.formats.packing import check_refined
from teal.layers.block_linear import BlockEmbedding, BlockLinear, BlockShape
from teal.layers.quantized_embedding import QuantizedEmbedding, use_quantized_modules
from teal.layers.quantized_linear import QuantConfig, QuantizedLinear, use_input_groups
from teal.model import Block, ModelConfig, Transformer
from teal.parallel import Cut, Rank
from teal.progress import progress

INDEX = "model.safetensors.index.json"
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".pth", ".pt", ".gguf")
READABLE_DTYPES = ("F32", "F16", "BF16")
BLOCK_DEVICES = ("cpu",)  # whose kernels read GGUF's block types
COMPARED_ROWS = 1024  # of head and embedding at a time
PACKED_DTYPES = {torch.int8: "I8", torch.int32: "I32", torch.uint8: "U8"}  # of quantized weights


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, keep_integers: bool = False, rank: Rank | None = None
) -> Transformer:  # fmt: skip
    """The model in a Hugging Face folder, in eval mode, with its weights on device as dtype.

    keep_integers: those of a GGUF file stay what they are, where the device has kernels for them. Else they become
    floats. rank: load its part alone, whose config has as many tokens as it has rows. Raises UserError for a folder
    that is incomplete, damaged, or holds another architecture. Also for a weight that is NaN or infinite, in the file
    or as dtype.
    """
    config = stored_config(folder)
    quantized = load_quantization(folder)
    shards = find_shards(folder)
    packing = quantized if isinstance(quantized, Packing) else None
    layout = read_layout(folder)
    if packing is not None and layout is not None and layout.changes_projections():
        raise UserError(f"{folder}: {packing.method} weights of this family are not supported; start from its floats")
    part = config
    if rank is not None:
        check_rank(config, rank, quantized, str(folder))
        part, keep_integers = part_config(config, rank), keep_integers and device.type not in BLOCK_DEVICES
    blocks = block_shapes(shards) if keep_integers else {}
    kinds = {blocks[name].kind if (name := f"{n}.weight") in blocks else "" for n in hf_projection_names(config)}
    quantize: Callable[[Transformer], None] | None = None
    form = Form.FLOATS
    if isinstance(quantized, QuantConfig):
        quantize = partial(use_quantized_modules, config=quantized)
    elif packing is not None and (rank is None or packing.group_size > 0) and _can_be_repacked(part, packing, shards):
        quantize = partial(use_input_groups, bits=packing.bits, group_size=packing.group_size)
    elif device.type in BLOCK_DEVICES and blocks:
        form, quantize = Form.BYTES, partial(use_block_modules, shapes=blocks, prefix=layer_prefix)
    elif len(kinds) == 1 and (kind := kinds.pop()) in GROUP_TYPES and fills_groups(part, MIN_GROUP):
        form, quantize = Form.GROUPS, partial(use_input_groups, bits=GROUP_TYPES[kind], group_size=MIN_GROUP)
    model = empty_model(part, device, dtype, quantize)
    whole = model if part is config else empty_model(config, torch.device("meta"), dtype, quantize)
    targets = Targets(model, packing, whole, {} if rank is None else rank.cuts(config))
    forms = {name: form for name in blocks if targets.takes(name, form)}
    _check_shards(shards, targets.stored, config, forms)
    for shard in progress(shards, "loading weights", "shard"):
        with open_shard(shard, forms) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                if name in targets.stored:
                    targets.take(name, tensors.get_tensor(name), shard)
    return model


def block_shapes(shards: list[Path]) -> dict[str, BlockShape]:
    """The weights in blocks of these files, by name."""
    found: dict[str, BlockShape] = {}
    for shard in shards:
        with open_shard(shard) as tensors:
            found |= tensors.shapes
    return found


def _can_be_repacked(config: ModelConfig, packing: Packing, shards: list[Path]) -> bool:
    """Whether all projections of an AWQ or GPTQ checkpoint can be held in its own integers."""
    if not all(packing.can_be_repacked(N, p.in_features) for p in config.projections() for N in p.sizes):
        return False
    for shard in shards:
        with open_shard(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                part = name.rpartition(".")[2]
                if part in packing.deciding_parts and not packing.allows(part, tensors.get_tensor(name)):
                    return False
    return True


class Targets:
    """What takes the tensors of a checkpoint: a model, with the weights of an AWQ or GPTQ one as packing says.

    Such a weight is set as soon as all parts of it have been read. whole: the model that the files hold, of which model
    may be a part, by cuts.
    """

    def __init__(self, model: Transformer, packing: Packing | None, whole: Transformer, cuts: dict[str, Cut]) -> None:
        self.packing, self.cuts = packing, cuts
        self.targets, stored = weight_targets(model), weight_targets(whole)
        self.stored: dict[str, Tensor] = {}  # tensor name -> its shape and dtype, of all that the files must hold
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.refined: dict[int, str] = {}  # by id of a target: the tensor that set it, of several that must be equal
        self.parts: dict[str, int] = {}  # how many of each weight
        projections = hf_projection_names(model.config)
        for name, target in stored.items():
            prefix, _, part = name.rpartition(".")
            if packing is None or prefix not in projections or part == "bias":
                self.stored[name] = target
            elif part in ("weight", "qweight"):
                scales = stored.get(f"{prefix}.scales")  # of a weight that is held in integers
                N, K = target.shape if scales is None else (scales.shape[1], target.shape[0])
                parts = packing.parts(N, K, target.dtype if scales is None else scales.dtype)
                self.parts[prefix] = len(parts)
                self.stored |= {f"{prefix}.{part}": like for part, like in parts.items()}

    def takes(self, name: str, form: Form) -> bool:
        """Whether a weight in blocks is to be read in this form."""
        target = self.targets.get(name)
        if form == Form.GROUPS:
            return target is None and name.removesuffix("weight") + GROUP_PARTS[0] in self.targets
        return target is not None and target.dtype == torch.uint8

    def take(self, name: str, tensor: Tensor, shard: Path) -> None:
        """Set what this tensor stands for, if it is the last part.

        Raises UserError, naming the file, if it is not finite.
        """
        prefix, _, part = name.rpartition(".")
        if self.packing is None or prefix not in self.parts or part == "bias":
            self._set(name, tensor, shard)
            return
        parts = self.waiting.setdefault(prefix, {})
        parts[part] = tensor
        if len(parts) < self.parts[prefix]:
            return
        del self.waiting[prefix]
        if f"{prefix}.weight" in self.targets:
            try:
                weight = self.packing.weight(parts)
            except UserError as error:
                raise UserError(f"{shard}: {prefix}: {error}; the checkpoint is damaged, download it again") from None
            self._set(f"{prefix}.weight", weight, shard)
        else:
            for kind, values in zip(("qweight", "scales", "zeros"), self.packing.repacked(parts), strict=True):
                if values is not None:
                    self._set(f"{prefix}.{kind}", values, shard)

    def _set(self, name: str, values: Tensor, shard: Path) -> None:
        target = self.targets[name]
        if name.endswith(".refined"):
            self._check_refined(name, values, shard)
        if (cut := cut_of(name, self.cuts)) is not None:
            try:
                values = cut_tensor(values, cut, name, target)
            except UserError as error:
                raise UserError(f"{shard}: {name} {error}; use fewer devices") from None
        if map_blocks(target, values):
            return
        target.copy_(values.to(target.device))
        if not target.is_floating_point() or is_finite(target):
            return
        check_finite(values, shard, name)
        dtype, wider = ("bf16", "fp32") if target.dtype == torch.bfloat16 else ("fp16", "bf16 or fp32")
        largest, limit = float(values.abs().max()), torch.finfo(target.dtype).max
        raise ParameterError(
            "{}: {} reaches {:.4g}, beyond the {:.4g} of {}; use {dtype} {}", shard, name, largest, limit, dtype, wider
        )

    def _check_refined(self, name: str, values: Tensor, shard: Path) -> None:
        """Raise UserError unless these are rising channels, and those of the projections that share their rows."""
        target = self.targets[name]
        channels = self.targets[name.removesuffix("refined") + "qweight"].shape[0] - len(values)
        try:
            check_refined(values, channels)
        except ValueError as error:
            raise UserError(f"{shard}: {name}: {error}; quantize the model again") from None
        first = self.refined.setdefault(id(target), name)
        if first != name and not torch.equal(values, target.cpu()):
            raise UserError(f"{shard}: {name} differs from {first}; expected the same, quantize the model again")


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. aminmax reads at memory's speed, isfinite at a twentieth of it."""
    low, high = torch.aminmax(tensor)  # of a tensor with a NaN both are NaN
    return bool(low.isfinite() and high.isfinite())


def check_finite(tensor: Tensor, path: Path, name: str) -> None:
    """Raise UserError if tensor, called name in the file at path, holds NaN or infinity."""
    if tensor.is_floating_point() and not is_finite(tensor):
        raise UserError(f"{path}: {name} holds NaN or infinity; the checkpoint is damaged, download it again")


def stored_config(folder: Path) -> ModelConfig:
    """The architecture in folder, with a head of its own if the files hold one unlike the embedding.

    As transformers does: tie_word_embeddings cannot take back a head that was trained. Raises UserError.
    """
    config = load_config(folder)
    if config.tie_embeddings and _has_own_head(find_shards(folder)):
        return replace(config, tie_embeddings=False)
    return config


def _has_own_head(shards: list[Path]) -> bool:
    """Whether lm_head.weight is there and differs from the embedding. Compares rows as far as the first difference."""
    with ExitStack() as stack:
        opened = [stack.enter_context(open_shard(shard)) for shard in shards]
        where = {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118 - safe_open is no dict
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if not all(name in where for name in names):
            return False
        head, embedding = (where[name].get_slice(name) for name in names)
        if head.get_shape() != embedding.get_shape():
            return True
        rows = range(0, head.get_shape()[0], COMPARED_ROWS)
        return not all(
            torch.equal(head[i : i + COMPARED_ROWS].float(), embedding[i : i + COMPARED_ROWS].float()) for i in rows
        )


def empty_model(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, quantize: Callable[[Transformer], None] | None = None
) -> Transformer:
    """A Transformer whose weights are allocated on device but not set.

    quantize: puts modules for quantized weights in place.
    """
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        if quantize is not None:
            quantize(model)
    # As Module.to_empty. Its empty_like of a tensor on meta imports sympy: 0.3 s and 34 MB.
    model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))
    model.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, BlockLinear)):
            module.thresholds.zero_()
    if config.tie_embeddings and not isinstance(model.lm_head, QuantizedLinear):
        model.lm_head.weight = model.embedding.weight
    return model


def weight_targets(model: Transformer) -> dict[str, Tensor]:
    """Hugging Face tensor name -> the tensor (often a slice of a stacked weight) that takes its values."""
    c = model.config
    targets: dict[str, Tensor] = {f"model.norm.{suffix}": own for suffix, own in model.norm.named_parameters()}
    if isinstance(model.embedding, BlockEmbedding):
        targets["model.embed_tokens.weight"] = model.embedding.weight.data[0]
    for suffix, parameter in () if isinstance(model.embedding, BlockEmbedding) else model.embedding.named_parameters():
        is_packed = suffix == "weight" and isinstance(model.embedding, QuantizedEmbedding)
        targets[f"model.embed_tokens.{'qweight' if is_packed else suffix}"] = parameter
    if not c.tie_embeddings or isinstance(model.lm_head, QuantizedLinear):
        targets |= projection_targets(model.lm_head, {"lm_head": c.vocab_size})
    for i, block in enumerate(model.blocks):
        targets |= {f"{layer_prefix(i)}{name}": tensor for name, tensor in block_targets(block).items()}
    return targets


def layer_prefix(i: int) -> str:
    """What the names of layer i's tensors begin with."""
    return f"model.layers.{i}."


def hf_projection_names(config: ModelConfig) -> set[str]:
    """The Hugging Face names of all layers' projections: those of their tensors less the last part, as .weight."""
    names = [name for p in config.projections() for name in p.hf_names]
    return {layer_prefix(i) + name for i in range(config.num_layers) for name in names}


def block_targets(block: Block) -> dict[str, Tensor]:
    """As weight_targets, for one block; names without its layer_prefix."""
    targets: dict[str, Tensor] = {}
    for p in block.projections():
        targets |= projection_targets(block.get_submodule(p.module), dict(zip(p.hf_names, p.sizes, strict=True)))
    for name, norm in block.norms().items():
        targets |= {f"{name}.{suffix}": parameter for suffix, parameter in norm.named_parameters()}
    return targets


def projection_targets(module: nn.Module, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Tensor name -> slice, for a linear layer that stacks the projections of these names and widths."""
    targets: dict[str, Tensor] = {}
    if isinstance(module, BlockLinear):
        targets |= {f"{name}.weight": data for name, data in zip(sizes, module.weight.data, strict=True)}
    for suffix, parameter in module.named_parameters():
        if suffix.startswith("weight."):  # those of a BlockWeight
            continue
        if isinstance(module, QuantizedLinear) and suffix != "bias":
            suffix, dim = {"weight": "qweight"}.get(suffix, suffix), 1  # input-channel-major
            per_column = module.out_features // parameter.shape[1]  # weights to a word, or to a scale
        else:
            dim, per_column = 0, 1
        parts = parameter.split([size // per_column for size in sizes.values()], dim=dim)
        targets |= {f"{name}.{suffix}": part for name, part in zip(sizes, parts, strict=True)}
    if isinstance(module, QuantizedLinear) and module.refined is not None:
        targets |= {f"{name}.refined": module.refined for name in sizes}  # the rows that they share
    return targets


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that hold the model, from the index if there is one. Raises UserError if none."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map; download it again")
        names = sorted(set(weight_map.values()))
    elif (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        names = sorted(p.name for p in folder.glob("*.safetensors"))
        if len(names) > 1:
            raise UserError(f"{folder}: has {len(names)} safetensors files and no {index.name}; download the index too")
    if not names:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern))
        if pickles:
            raise UserError(f"{folder}: holds only pickle weights ({pickles[0]}), which can run code; use safetensors")
        raise UserError(f"{folder}: holds no *.safetensors file; expected a Hugging Face checkpoint folder")
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: named by {index.name} but missing; download it")
    return [folder / name for name in names]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file of folder that holds it. Raises UserError as find_shards does."""
    where: dict[str, Path] = {}
    for shard in find_shards(folder):
        with open_shard(shard) as tensors:
            where |= dict.fromkeys(tensors.keys(), shard)
    return where


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """The index of a folder's shards: tensor name -> name of the file that holds it; total_size in bytes."""
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_other_files(source: Path, target: Path, without: str = "") -> None:
    """Copy what lies in source beside weights (tokenizer, plans and the like), but for names that match a pattern."""
    for path in source.iterdir():
        skipped = path.name.endswith(WEIGHT_FILES) or path.name.startswith(".") or not path.is_file()
        if not skipped and not fnmatch(path.name, without):
            shutil.copyfile(path, target / path.name)


def _check_shards(
    shards: list[Path], targets: dict[str, Tensor], config: ModelConfig, forms: Mapping[str, Form]
) -> None:  # fmt: skip
    missing = set(targets)
    for shard in shards:
        with open_shard(shard, forms) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no dict
                missing.discard(name)
                # Old Llama files carry rotary tables; tied models may carry the embedding twice.
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_embeddings):
                    continue
                if name not in targets:
                    raise UserError(f"{shard}: unexpected tensor {name}; config.json describes a model without it")
                header = tensors.get_slice(name)
                packed = PACKED_DTYPES.get(targets[name].dtype)
                readable = READABLE_DTYPES if packed is None else (packed,)
                if header.get_dtype() not in readable:
                    raise UserError(
                        f"{shard}: {name} has dtype {header.get_dtype()}; expected one of {', '.join(readable)}"
                    )
                expected = list(targets[name].shape)
                if header.get_shape() != expected:
                    raise UserError(
                        f"{shard}: {name} has shape {header.get_shape()}; config.json says it should be {expected}"
                    )
    if missing:
        raise UserError(f"{shards[0].parent}: missing tensor {min(missing)} ({len(missing)} missing in all)")
