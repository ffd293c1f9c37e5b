"""Models of random weights for tests of the decode program, and their fp32 reference in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor, nn

from teal.decoding.backends import FusedBackend
from teal.decoding.cuda_program import CudaProgramBackend
from teal.kernels.program.shapes import Device, Format, Model
from teal.layers.int8_cache import has_int8_cache, use_int8_cache
from teal.layers.quantized_linear import (
    QuantConfig,
    QuantizedHead,
    pick_group_size,
    round_to_nearest,
    use_quantized_linears,
)
from teal.model import ModelConfig, RMSNorm, Transformer
from teal.plan import ProjectionPlan, SparsityPlan
from teal.teal_layers import SparseLinear, sparsify
from tests.conftest import PROJECTIONS, assert_near
from tests.token_logits import step_logits

SMALL = ModelConfig(
    vocab_size=1024, hidden_size=512, intermediate_size=1408, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=64,
    max_seq_len=256,
)  # fmt: skip
LLAMA_3_8B = ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192)
QWEN_7B = ModelConfig(152064, 3584, 18944, 28, 28, 4, 128, 8192, qkv_bias=True)
MISTRAL_LARGE = ModelConfig(32768, 12288, 28672, 88, 96, 8, 128, 8192)
LLAMA_1B = ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192)
A100, RTX_4090 = Device(108, 166912, (8, 0), 2039.0), Device(128, 101376, (8, 9), 1008.0)
H100, H200 = Device(132, 232448, (9, 0), 3352.0), Device(132, 232448, (9, 0), 4814.0)
THRESHOLDS = {"q": 0.5, "k": 0.6, "v": 0.4, "o": 0.1, "gate": 0.7, "up": 0.4, "down": 0.3}
PROMPT, STEPS = 150, 2
TINY = ModelConfig(
    vocab_size=320, hidden_size=128, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    max_seq_len=256,
)  # fmt: skip
WIDE = ModelConfig(
    vocab_size=320, hidden_size=256, intermediate_size=640, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=32,
    max_seq_len=256,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bias-norm-window": {
        "qkv_bias": True,
        "o_bias": True,
        "qk_norm": True,
        "sliding_windows": (40, 7),
        "local_rope_theta": 500.0,
    },
    "unrotated": {"unrotated_layers": (0, 1)},
    "seven-heads-a-key": {"num_heads": 7, "num_kv_heads": 1},
    "wide": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 128},  # two warps share 16 positions
    "widest": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256},
    "narrow": {"num_heads": 6, "head_dim": 16, "hidden_size": 96, "intermediate_size": 160},
    "tied": {"tie_embeddings": True},
}


def described(config: ModelConfig, bits: int, head_bits: int, dtype: torch.dtype = torch.bfloat16) -> Model:
    """What the plan sees of a model whose weights have so many bits."""
    group = 1 if bits == 16 else 128
    qkv, o, gate_up, down = (Format(p.in_features, sum(p.sizes), bits, group) for p in config.projections())
    head = None if head_bits == 16 else Format(config.hidden_size, config.vocab_size, head_bits, 128)
    return Model(config, dtype, (qkv, o, gate_up, down), head)


def random_model(
    config: ModelConfig, dtype: torch.dtype, quant: str | None, lm_head: bool, sparse: bool, device: str, seed: int = 0
) -> Transformer:
    """A model of random weights, whose entries are about 1 all through it."""
    return prepared(random_dense(config, seed).to(device, dtype), quant, lm_head, sparse)


def random_dense(config: ModelConfig, seed: int = 0) -> Transformer:
    """As random_model, in fp32 and as plain as it is made."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.1 if "bias" in name or "norm" in name else 1 if "embedding" in name else p.shape[-1] ** -0.5
        p.data = noise * scale + (1 if "norm" in name else 0)
    return model.requires_grad_(False)


def prepared(
    model: Transformer, quant: str | None, lm_head: bool, sparse: bool, group: int | None = None
) -> Transformer:  # fmt: skip
    """A dense model, rounded in groups of this size, by default the largest, and made sparse in place.

    quant: "int4-input" is int4 with groups along the input.
    """
    model.requires_grad_(False)
    if quant == "mixed":
        use_quantized_linears(model, mixed_scheme(model.config, lm_head), fill=True)
    elif quant:
        mode, _, grouping = quant.partition("-")
        size = pick_group_size(model.config, group, lm_head)
        scheme = QuantConfig(mode, size, lm_head, grouping=grouping or "output")
        use_quantized_linears(model, scheme, fill=True)
    layer = {name: ProjectionPlan(0.5, THRESHOLDS[name] if sparse else 0.0) for name in PROJECTIONS}
    return sparsify(model, SparsityPlan({}, "test", 0.5, (layer,) * model.config.num_layers))


def mixed_scheme(config: ModelConfig, lm_head: bool) -> QuantConfig:
    """Projections of 4 bits with second rows of some channels, and the head if asked; the first layer has none."""
    projections = config.projections()
    counts = tuple(p.in_features * share // 10 for p, share in zip(projections, (1, 3, 2, 5), strict=True))
    refined = ((0,) * len(projections), *[counts] * (config.num_layers - 1))
    return QuantConfig(
        "mixed", pick_group_size(config, None, lm_head), lm_head, average_bits=8.0, head_bits=4 if lm_head else 8,
        refined=refined, refined_head=config.hidden_size // 7 if lm_head else 0,
    )  # fmt: skip


def use_int4_head(model: Transformer) -> Transformer:
    """model with its head in 4 bits, in place."""
    group = pick_group_size(model.config, None, True)
    head = QuantizedHead(model.lm_head, group, bits=4)
    head.set_weight(*round_to_nearest(model.lm_head.weight.t().contiguous(), 4, group))
    model.lm_head = head  # type: ignore[assignment]
    return model


class PlainLinear(nn.Module):
    """The fp32 reference of a SparseLinear: what is below a name's threshold, in the model's dtype, counts as 0."""

    def __init__(self, module: SparseLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = module.dequantized().float().split(module.sizes, dim=1)
        self.limits = module.name_thresholds.to(dtype).float()
        self.bias = None if module.bias is None else module.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        limits = self.limits if x.shape[1] == 1 else torch.zeros_like(self.limits)  # a prompt is dense
        kept = [torch.where(x.abs() < limit, 0.0, x) for limit in limits]
        y = torch.cat([part @ weight for part, weight in zip(kept, self.parts, strict=True)], dim=-1)
        return y if self.bias is None else y + self.bias


def reference(model: Transformer) -> Transformer:
    """The model in fp32 and plain PyTorch."""
    dtype, plain = model.dtype, Transformer(model.config).to(model.device)
    tokens = torch.arange(model.config.vocab_size, device=model.device)
    for ours, its in zip(plain.blocks, model.blocks, strict=True):
        for p in ours.projections():
            module = its.get_submodule(p.module)
            assert isinstance(module, SparseLinear)
            ours.set_submodule(p.module, PlainLinear(module, dtype))
        for mine, norm in zip(ours.norms().values(), its.norms().values(), strict=True):
            if isinstance(norm, RMSNorm):
                mine.weight = nn.Parameter(norm.weight.float())
    head: Any = model.lm_head
    weight = head.dequantized().float().t() if hasattr(head, "dequantized") else head.weight.float()
    plain.lm_head.weight = nn.Parameter(weight.contiguous())
    plain.embedding.weight.data, plain.norm.weight.data = model.embedding(tokens).float(), model.norm.weight.float()
    if has_int8_cache(model):
        use_int8_cache(plain)
    return plain.requires_grad_(False)


@torch.inference_mode()
def expected_logits(model: Transformer, ids: Tensor) -> Tensor:
    """Logits [STEPS, 1, V] of the reference's steps after a prompt."""
    plain, device = reference(model), ids.device
    cache = plain.new_cache(1, PROMPT + STEPS)
    plain.hidden_states(ids[:, :PROMPT], torch.arange(PROMPT, device=device)[None], cache)
    places = torch.arange(PROMPT, PROMPT + STEPS, device=device)[:, None, None]
    return torch.stack([plain(ids[:, int(p) : int(p) + 1], p, cache)[:, 0] for p in places])


@torch.inference_mode()
def program_logits(backend: CudaProgramBackend, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The program's step_logits; and those of its own head [1, V], after the first of these tokens."""
    found, cache = step_logits(backend, ids, PROMPT)
    token, position = ids[:, PROMPT : PROMPT + 1].clone(), torch.full((1, 1), PROMPT, device=ids.device)
    logits = backend.choose(token, position, cache)
    assert logits is not None and int(token) == int(logits.argmax()) and int(position) == PROMPT + 1
    return found, logits


@torch.inference_mode()
def one_step(backend: CudaProgramBackend) -> Tensor:
    """Logits [1, V] of a step at position 40, after keys and values of noise."""
    device = backend.model.device
    cache, generator = backend.model.new_cache(1, 64), torch.Generator(device).manual_seed(0)
    cache.k.normal_(generator=generator), cache.v.normal_(generator=generator)
    logits = backend.choose(torch.tensor([[7]], device=device), torch.full((1, 1), 40, device=device), cache)
    assert logits is not None
    return logits.clone()


def check_on_gpu(model: Transformer, limit: float) -> None:
    """check_logits, and the same bits in every run."""
    backend = CudaProgramBackend(FusedBackend(model, "test", compile=False))
    first = check_logits(backend, limit)
    for _ in range(10):
        assert all(map(torch.equal, program_logits(backend, some_ids(model)), first)), "bits differ between runs"


def some_ids(model: Transformer) -> Tensor:
    """Token ids [1, PROMPT + STEPS]."""
    shape, generator = (1, PROMPT + STEPS), torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.embedding.weight.device)


def check_logits(backend: CudaProgramBackend, limit: float) -> tuple[Tensor, Tensor]:
    """The program's logits, which are the reference's."""
    ids = some_ids(backend.model)
    expected = expected_logits(backend.model, ids)
    logits, of_its_head = program_logits(backend, ids)
    assert_near("logits", logits, expected, limit)
    assert_near("logits of the program's head", of_its_head, expected[0], limit)
    return logits, of_its_head
