"""Sum of the gate and up partials, activation(gate) * up, and the sparse GEMV of the down projection, in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from teal.kernels.formats.packing import Weight
from teal.kernels.gemv.gather import owned_work, rounded, wait_for_previous
from teal.kernels.gemv.launch import check_gemv, check_partials, empty_partials, plan_gemv
from teal.kernels.gemv.op import make_op
from teal.kernels.gemv.sparse_product import sparse_product
from teal.kernels.gemv.tuning import GemvTile

KINDS = ("silu", "gelu_tanh")


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """silu(x) = x sigmoid(x), or GELU with tanh (Hendrycks & Gimpel 2016), for fp32 x.

    x/2 (1 + tanh(u)) is x sigmoid(2 u), with u = sqrt(2/pi) (x + 0.044715 x^3).
    """
    u = x
    if ACTIVATION == "gelu_tanh":
        u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-u))


@triton.jit(do_not_specialize=["B", "E"])
def activation_gemv_kernel(
    p_gate_up, p_weight, stride, p_scale, p_zero, p_refined, p_threshold, p_index, p_value, p_partial,
    B, K, E, N, n_0, n_1, n_2, SPLITS_IN: tl.constexpr, ACTIVATION: tl.constexpr, META: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    BLOCK_B: tl.constexpr = META.BLOCK_B
    BLOCK_R: tl.constexpr = META.BLOCK_R
    weight_rows, channels, threshold, start, end = owned_work(p_refined, p_threshold, K, E, n_0, n_1, n_2, META)
    wait_for_previous(PDL)
    rows = tl.arange(0, BLOCK_B)[:, None]
    inside = (rows < B) & (channels < K)[None, :]
    gate = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    up = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    for s in tl.static_range(SPLITS_IN):
        p_row = p_gate_up + (s * B + rows) * (2 * K) + channels[None, :]
        gate += tl.load(p_row, mask=inside, other=0.0)
        up += tl.load(p_row + K, mask=inside, other=0.0)
    gate = rounded(gate, META.DTYPE)
    x = rounded(activated(gate, ACTIVATION) * rounded(up, META.DTYPE), META.DTYPE)
    sparse_product(
        x, threshold, weight_rows, channels, start, end, p_weight, stride, p_scale, p_zero, p_index, p_value, p_partial,
        B, K, N, META, PDL,
    )  # fmt: skip


def launch(
    gate_up: Tensor, weight: Tensor, thresholds: Tensor, scales: Tensor | None = None, zeros: Tensor | None = None,
    refined: Tensor | None = None, activation: str = "silu", tile: GemvTile | None = None,
) -> Tensor:  # fmt: skip
    """As sparse_gemv of activation(gate) * up, from the partial sums gate_up fp32 [splits, B, 2 K] of both projections.

    weight is [K, N]; thresholds fp32 [1]; activation is one of KINDS. Gate and up are rounded to weight's dtype, as
    their linear layers would, and so is their product. Raises ValueError on a mismatch.
    """
    matrix = Weight(weight, scales, zeros, refined)
    K = matrix.K
    if activation not in KINDS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(KINDS)}")
    check_partials(gate_up, 2 * K, weight)
    splits_in, B, _ = gate_up.shape
    check_gemv(matrix, thresholds, [matrix.N], K, B)
    plan = plan_gemv(matrix, thresholds, [matrix.N], B, tile)
    activation_gemv_kernel[plan.grid](
        gate_up, *plan.args, SPLITS_IN=splits_in, ACTIVATION=activation, META=plan.meta, **plan.options
    )
    return plan.partials


activation_gemv = make_op(
    "activation_gemv",
    launch,
    lambda gate_up, weight, scales, zeros, refined: empty_partials(
        Weight(weight, scales, zeros, refined), gate_up.shape[1]
    ),
)
