"""A plain decoder-only transformer, to be read top to bottom; families differ by the fields of ModelConfig.

Nothing here knows about sparsity, quantization, compilation or files: those replace modules or
wrap calls from outside. Shapes use B batch, T tokens of this call, S cache length, C hidden_size, V vocabulary.
Attention has H query heads, K key/value heads, G = H/K query heads per key/value head, D head_dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teal.projection import Projection
from teal.rope import RopeKind, RopeScaling, apply_rope, frequencies, rope_angles

# With this few query rows (decode) torch's fused attention fills a fraction of a GPU's cores. Two batched products and
# a softmax spread the cache over all: 5.86 against 6.30 ms a step on an H100, Llama-3-8B shapes, context 512.
SMALL_ATTENTION_ROWS = 16
# Weights of the output head that become fp32 at once on a CPU: 2 MB, which stay in a core's own cache.
HEAD_PART = 1 << 19
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of one model. sliding_windows holds, per layer, the attention window in tokens or None."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    # Families that differ in what follows are not plain; extras.py says how.
    activation: Literal["silu", "gelu_tanh"] = "silu"
    pre_norm: bool = True  # of what each sublayer reads
    post_norm: bool = False  # of what each sublayer adds
    qk_norm_full: bool = False  # q and k are normed over all heads at once, not each head by itself
    embedding_scale: float = 1.0
    attention_softcap: float | None = None  # scores become cap * tanh(scores / cap)
    logit_softcap: float | None = None
    rotary_dim: int | None = None  # channels of a head that turn: as many of its first and of its second half
    local_rope_theta: float | None = None  # of layers with a window, which then have no rope_scaling
    unrotated_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sliding_windows:
            object.__setattr__(self, "sliding_windows", (None,) * self.num_layers)
        if len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"sliding_windows has {len(self.sliding_windows)} entries for {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        turned = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if self.head_dim % 2 or turned % 2 or turned > self.head_dim:
            raise ValueError(f"{turned} channels of heads of {self.head_dim} cannot turn in pairs")

    def ropes(self) -> list[RopeKind]:
        """Which rotation each layer has."""
        local: RopeKind = "global" if self.local_rope_theta is None else "local"
        own: list[RopeKind] = ["global" if window is None else local for window in self.sliding_windows]
        return ["none" if i in self.unrotated_layers else kind for i, kind in enumerate(own)]

    def rope(self, kind: RopeKind) -> tuple[int, float, RopeScaling | None]:
        """Of a kind of rotation: the channels that turn, theta and scaling."""
        turned = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if kind == "local" and self.local_rope_theta is not None:
            return turned, self.local_rope_theta, None
        return turned if kind == "global" else 0, self.rope_theta, self.rope_scaling

    def embedding_factor(self, dtype: torch.dtype) -> float:
        """embedding_scale as a model of this dtype has it: sqrt(3072) in bf16 is 55.5 (Gemma)."""
        return float(torch.tensor(self.embedding_scale, dtype=dtype))

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def projections(self) -> tuple[Projection, ...]:
        """The linear layers of each block, in the order of its forward pass.

        x ─ norm ─ [q k v] ─ attention ─ [o] ─ end ─ + ─ norm ─ [gate up] ─ act(gate) * up ─ [down] ─ end ─ +
               normed             attended                normed                       activated
        """
        C, D, q, kv = self.hidden_size, self.head_dim, self.q_size, self.kv_size
        return (
            Projection(
                name="qkv", module="attention.wqkv", norm="attention_norm", input="normed", in_features=C,
                names=("q", "k", "v"), sizes=(q, kv, kv), bias=self.qkv_bias, unit=D,
                hf_names=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ),
            Projection(
                name="o", module="attention.wo", norm="attention_norm", input="attended", in_features=q,
                names=("o",), sizes=(C,), bias=self.o_bias, unit=D, hf_names=("self_attn.o_proj",), end="attention_end",
            ),
            Projection(
                name="gate_up", module="feed_forward.gate_up", norm="ffn_norm", input="normed", in_features=C,
                names=("gate", "up"), sizes=(self.intermediate_size,) * 2, hf_names=("mlp.gate_proj", "mlp.up_proj"),
            ),
            Projection(
                name="down", module="feed_forward.down", norm="ffn_norm", input="activated", end="ffn_end",
                in_features=self.intermediate_size, names=("down",), sizes=(C,), hf_names=("mlp.down_proj",),
            ),
        )  # fmt: skip


class KVCache:
    """Static key/value cache: k and v are [num_layers, B, K, S, D], written in place at given positions.

    layers is how many of config's it is for, by default all; width is what a head's vector takes, if not D values.
    """

    def __init__(
        self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype,
        layers: int | None = None, width: int | None = None,
    ) -> None:  # fmt: skip
        shape = (layers or config.num_layers, batch, config.num_kv_heads, length, width or config.head_dim)
        # zeros, not empty: masked positions still enter the product with weight 0, and 0 * NaN is NaN
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def length(self) -> int:
        return self.k.shape[3]

    def part(self, rows: slice, length: int | None) -> "KVCache":
        """A view of some rows and of their first length positions."""
        view = object.__new__(KVCache)
        view.k, view.v = self.k[:, rows, :, :length], self.v[:, rows, :, :length]
        return view


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in weight's dtype; sums in fp32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(self.weight.dtype) * self.weight


class Unnormed(nn.Module):
    """What stands for the norm before a sublayer where there is none: x in the dtype of the weights."""

    like: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.like.dtype)


def rope_frequencies(config: ModelConfig, device: torch.device, kind: RopeKind = "global") -> Tensor:
    """As frequencies of rope.py, of layers with a rotation of this kind: fp32 [D/2]."""
    return frequencies(config.head_dim, *config.rope(kind), device)


def capped(x: Tensor, cap: float) -> Tensor:
    """x drawn smoothly into the interval from -cap to cap (Gemma 2)."""
    return cap * torch.tanh(x / cap)


def attention_mask(positions: Tensor, length: int, groups: int, window: int | None) -> Tensor:
    """Which cache slots each query may read: bool [B, 1, G*T, S], for positions [B, T] and S = length."""
    slots = torch.arange(length, device=positions.device)
    behind = positions[:, None, :, None] - slots  # [B, 1, T, S]: 0 is the token itself
    allowed = behind >= 0
    if window is not None:
        allowed &= behind < window
    return allowed.repeat(1, 1, groups, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over allowed slots: q [B, K, R, D], k and v [B, K, S, D], mask bool [B, 1, R, S]."""
    if softcap is not None:
        scores = capped((q @ k.mT).float() / math.sqrt(q.shape[-1]), softcap)
        return scores.masked_fill(~mask, -math.inf).softmax(dim=-1).to(v.dtype) @ v
    if q.is_cuda and q.shape[2] <= SMALL_ATTENTION_ROWS:
        B, K, R, D = q.shape
        scores = torch.bmm(q.view(B * K, R, D), k.view(B * K, -1, D).mT, out_dtype=torch.float32).view(B, K, R, -1)
        weights = (scores / math.sqrt(D)).masked_fill(~mask, -math.inf).softmax(dim=-1)
        return weights.to(v.dtype) @ v
    if not q.is_cuda and q.shape[0] > 1:  # a row's bits are then those it has alone
        rows = zip(q.split(1), k.split(1), v.split(1), mask.split(1), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*row[:3], attn_mask=row[3]) for row in rows])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings; wqkv stacks the q, k and v projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.hidden_size, config.q_size + 2 * config.kv_size, bias=config.qkv_bias)
        self.wo = nn.Linear(config.q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            q, kv = (config.q_size, config.kv_size) if config.qk_norm_full else (config.head_dim,) * 2
            self.q_norm: nn.Module = RMSNorm(q, config.norm_eps)
            self.k_norm: nn.Module = RMSNorm(kv, config.norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        c = self.config
        B, T, _ = x.shape
        K, G, D = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
        q, k, v = self.wqkv(x).split((c.q_size, c.kv_size, c.kv_size), dim=-1)
        if c.qk_norm_full:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.view(B, T, K * G, D), k.view(B, T, K, D)
        if not c.qk_norm_full:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        # The G query heads that share a key/value head become extra query rows: no copy of the cache.
        q = q.view(B, T, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
        y = self.attend_cached(q, k, v.view(B, T, K, D), mask, positions, k_cache, v_cache)
        y = y.view(B, K, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, K * G * D)
        return self.wo(y)

    def cached_vector(self, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Width and dtype of what a KVCache holds of a head's key or value in dtype: here the vector itself."""
        return self.config.head_dim, dtype

    def attend_cached(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        """Put k, v [B, T, K, D] into the caches [B, K, S, D] at positions; attention of q [B, K, G*T, D] over them."""
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        k_cache[rows, :, positions] = k
        v_cache[rows, :, positions] = v
        return attend(q, k_cache, v_cache, mask, self.config.attention_softcap)


class FeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)); gate_up stacks the gate and up projections (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    """x + end(attention(norm(x))), then x + end(feed_forward(norm(x))); x [B, T, C] is fp32.

    A plain block norms what its sublayers read, and ends are identities.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(size, eps) if config.pre_norm else Unnormed()
        self.attention = Attention(config)
        self.attention_end = RMSNorm(size, eps) if config.post_norm else nn.Identity()
        self.ffn_norm = RMSNorm(size, eps) if config.pre_norm else Unnormed()
        self.feed_forward = FeedForward(config)
        self.ffn_end = RMSNorm(size, eps) if config.post_norm else nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
    ) -> Tensor:
        y = self.attention(self.attention_norm(x), cos, sin, mask, positions, k_cache, v_cache)
        x = x + self.attention_end(y)
        return x + self.ffn_end(self.feed_forward(self.ffn_norm(x)))

    def projections(self) -> tuple[Projection, ...]:
        """The description of its linear layers: get_submodule(projection.module) is one of them."""
        return self.config.projections()

    def norms(self) -> dict[str, nn.Module]:
        """Its norms by their names in a layer of a Hugging Face checkpoint; one without parameters is in no file."""
        q_norm, k_norm = self.attention.q_norm, self.attention.k_norm
        heads = {"self_attn.q_norm": q_norm, "self_attn.k_norm": k_norm}
        ends = {"post_self_attn_layernorm": self.attention_end, "post_mlp_layernorm": self.ffn_end}
        return heads | ends | {"input_layernorm": self.attention_norm, "post_attention_layernorm": self.ffn_norm}


class OutputHead(nn.Linear):
    """nn.Linear of any float dtype whose products are summed and returned in fp32.

    Rounded to bf16, logits near 25 are multiples of 1/8: the largest logits tie, and argmax takes the wrong one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] in the weight's dtype -> fp32 [..., V]."""
        if self.weight.dtype == torch.float32:
            return F.linear(x, self.weight)
        if x.is_cuda:
            rows = x.reshape(-1, self.in_features)
            return torch.mm(rows, self.weight.t(), out_dtype=torch.float32).view(*x.shape[:-1], self.out_features)
        parts = self.weight.split(max(1, HEAD_PART // self.in_features))
        return torch.cat([F.linear(x.float(), part.float()) for part in parts], dim=-1)


class Transformer(nn.Module):
    """Token ids to next-token logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not initialised: weights come from a file, and normal_ on the meta device costs a second of imports.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = OutputHead(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    @property
    def blocks(self) -> list[Block]:
        """self.layers by their type."""
        return cast(list[Block], list(self.layers))

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, keys and values, and of weights in floats."""
        return self.norm.weight.dtype

    def new_cache(self, batch: int, length: int, layers: int | None = None) -> KVCache:
        """An empty cache for all or so many layers, beside the weights, of what their attention keeps."""
        width, dtype = self.blocks[0].attention.cached_vector(self.dtype)
        return KVCache(self.config, batch, length, self.device, dtype, layers, width)

    def forward(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """Logits fp32 [B, T, V] of tokens at positions (both int64 [B, T]); writes keys and values into kv_cache."""
        return self.logits(self.hidden_states(tokens, positions, kv_cache))

    def hidden_states(self, tokens: Tensor, positions: Tensor, kv_cache: KVCache) -> Tensor:
        """Output of the last block, fp32 [B, T, C], before the final norm."""
        x = self.embed(tokens)
        tensors = self.position_tensors(positions, kv_cache.length)
        for layer, own, k, v in zip(self.layers, tensors, kv_cache.k, kv_cache.v, strict=True):
            x = layer(x, *own, positions, k, v)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block reads, fp32 [B, T, C].

        The residual stream stays fp32. Rounded to bf16 at each of its 60 sums it moved the default model's logits by
        0.1, and near ties with them.
        """
        x = self.embedding(tokens).float()
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_factor(self.dtype)

    def position_tensors(self, positions: Tensor, length: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What each layer reads of positions [B, T]: cos, sin [B, T, 1, D/2] and the attention mask [B, 1, G*T, S]."""
        c = self.config
        ropes, windows = c.ropes(), c.sliding_windows
        angles = {kind: rope_angles(positions, c.head_dim, *c.rope(kind)) for kind in dict.fromkeys(ropes)}
        groups = c.num_heads // c.num_kv_heads
        masks = {w: attention_mask(positions, length, groups, w) for w in dict.fromkeys(windows)}
        return [(*angles[kind], masks[window]) for kind, window in zip(ropes, windows, strict=True)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits fp32 [..., V] of hidden states [..., C]."""
        return self.unembed(self.norm(hidden))

    def unembed(self, normed: Tensor) -> Tensor:
        """Next-token logits fp32 [..., V] of what the final norm gives [..., C]."""
        logits, cap = self.lm_head(normed), self.config.logit_softcap
        return logits if cap is None else capped(logits, cap)
