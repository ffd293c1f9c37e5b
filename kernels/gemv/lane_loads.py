"""Loads of the tensor-core kernels, lane by lane: a tensor has one element for each thread of the program, in order."""

import triton
import triton.language as tl


@triton.jit
def leave_first(lane):
    """The cache policy of load_weights."""
    return tl.inline_asm_elementwise(
        "createpolicy.fractional.L2::evict_first.b64 $0, 1.0; // $1",
        "=l,r",
        [lane],
        dtype=tl.int64,
        is_pure=True,
        pack=1,
    )


@triton.jit
def address(base, row, size):
    """base + row * size, where row and size have 32 bits and base 64."""
    return tl.inline_asm_elementwise(
        "mad.wide.s32 $0, $1, $2, $3;", "=l,r,r,l", [row, size, base], dtype=tl.int64, is_pure=True, pack=1
    )


@triton.jit
def load_four(p):
    """The four words of 32 bits at each address p [THREADS]."""
    return tl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [p],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_weights(p, policy):
    """As load_four, of weights: they leave the L2 cache first."""
    return tl.inline_asm_elementwise(
        "ld.global.L1::evict_first.L2::cache_hint.v4.b32 {$0, $1, $2, $3}, [$4], $5;", "=r,=r,=r,=r,l,l",
        [p, policy], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_two(p, policy):
    """As load_weights, of two words."""
    return tl.inline_asm_elementwise(
        "ld.global.L1::evict_first.L2::cache_hint.v2.b32 {$0, $1}, [$2], $3;", "=r,=r,l,l",
        [p, policy], dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_scale(p, DTYPE: tl.constexpr):
    """A 16-bit scale at each address, as fp32."""
    if tl.bfloat16 == DTYPE:
        y = tl.inline_asm_elementwise(
            "{ .reg .b16 h, z; mov.b16 z, 0; ld.global.b16 h, [$1]; mov.b32 $0, {z, h}; }",
            "=f,l", [p], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        y = tl.inline_asm_elementwise(
            "{ .reg .b16 h; ld.global.b16 h, [$1]; cvt.f32.f16 $0, h; }",
            "=f,l", [p], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    return y


@triton.jit
def load_zero(p):
    """128 + the zero point at each address."""
    return tl.inline_asm_elementwise(
        "{ .reg .b16 h; .reg .b32 r; ld.global.u8 h, [$1]; cvt.u32.u16 r, h; shl.b32 r, r, 16; "
        "or.b32 $0, r, 0x43000000; }",
        "=f,l", [p], dtype=tl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_meta(scale, zero, groups_of_row, index, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Scales and zeros of a lane's four rows, as load_step; of 8 bits the scales twice."""
    i_0, i_1, i_2, i_3 = index
    size = 2 * groups_of_row
    s = (load_scale(address(scale, i_0, size), DTYPE), load_scale(address(scale, i_1, size), DTYPE),
         load_scale(address(scale, i_2, size), DTYPE), load_scale(address(scale, i_3, size), DTYPE))  # fmt: skip
    z = s
    if BITS == 4:
        size = groups_of_row
        z = (load_zero(address(zero, i_0, size)), load_zero(address(zero, i_1, size)),
             load_zero(address(zero, i_2, size)), load_zero(address(zero, i_3, size)))  # fmt: skip
    return s, z
