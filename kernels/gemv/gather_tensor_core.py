"""The sum of gather_quantized.py for one row of x on tensor cores: 1.6 instructions for four bits of weights, not 4.4.

1. A warp takes a step of 16 listed rows of weights, 128 bytes of each. Lane 4 r + c loads bytes 16 r to 16 r + 15 of
   four rows, by four loads of 16 bytes:

                     bytes 0..15    16..31          112..127
       rows  0..3     lane 0        lane 4    ...    lane 28     c = 0
       rows  4..7     lane 1        lane 5    ...    lane 29     c = 1
       rows  8..11    lane 2        lane 6    ...    lane 30     c = 2
       rows 12..15    lane 3        lane 7    ...    lane 31     c = 3
                      r = 0         r = 1            r = 7

2. That is what mma.m16n8k16 wants as A. Its depth is the 16 rows of weights. Its 16 rows are two nibbles of each of the
   eight r, taken from one word of the 16 bytes.
3. Nibbles become bf16 without a conversion: 0x4300 | n is 128 + n for n below 16, and one instruction makes two. An
   int8 q is two nibbles: q + 128 = 16 high + low, where the tensor cores add 16 times the high one.
4. B has x times scale in its columns, one column for each group in the 128 bytes. bf16 alone would leave an error of
   1e-3, so x times scale is the sum of two bf16, high and low, in two columns.
5. The zero-point correction, the sum of x scale (128 + zero), is added up beside and taken off at the end.

With groups along the input B has a column for each group that the program's channels touch. It holds x where the
channel is of that group, and 0 elsewhere. The sums of the groups stay apart and meet their scales at the end, once.

The code is written lane by lane. A tensor has one element for each thread of the program, in order. An instruction of
inline assembly works on one register of each.
"""

import triton
import triton.language as tl

from teal.kernels.gemv.gather import keep_loads_above, let_next_start
from teal.kernels.gemv.gather_quantized import load_column_scales
from teal.kernels.gemv.lane_loads import address, leave_first, load_four, load_meta, load_weights

STEP = tl.constexpr(16)  # rows of weights, the depth of the instruction
WARP_BYTES = tl.constexpr(128)  # of each row


def _tile_assembly(flip: int) -> str:
    """Assembly: 16 sums += 8 nibbles of a word of each of four rows, times B. flip is xored into odd nibbles."""
    even, odd = 0x43004300, 0x43004300 | flip | flip << 16
    lines = [".reg .b32 p, q, t, a0, a1, a2, a3;"]
    for half in (0, 1):
        select = "0x5410" if half == 0 else "0x7632"
        lines += [f"prmt.b32 p, $16, $17, {select};", f"prmt.b32 q, $18, $19, {select};"]
        for pair in (0, 1):
            for i, (source, register) in enumerate((("p", "a0"), ("p", "a1"), ("q", "a2"), ("q", "a3"))):
                nibble = 2 * pair + i % 2
                if nibble:
                    lines.append(f"shr.u32 t, {source}, {4 * nibble};")
                value = "t" if nibble else source
                lines.append(f"lop3.b32 {register}, {value}, 0x000f000f, {odd if i % 2 else even}, 0x6a;")
            d = 4 * (2 * half + pair)
            sums = [f"{{{', '.join(f'${base + d + j}' for j in range(4))}}}" for base in (0, 22)]
            lines.append(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                f"{sums[0]}, {{a0, a1, a2, a3}}, {{$20, $21}}, {sums[1]};"
            )
    return "{ " + " ".join(lines) + " }"


TILE_4 = tl.constexpr(_tile_assembly(0))
TILE_8 = tl.constexpr(_tile_assembly(8))  # int8 q to q + 128
TILE_REGISTERS = tl.constexpr(",".join(["=&f"] * 16 + ["r"] * 6 + ["f"] * 16))


@triton.jit
def pair(low, high):
    """Two fp32 rounded to bf16 in one word."""
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def low_of(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_of(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def add_tile(sums, w_0, w_1, w_2, w_3, b_0, b_1, BITS: tl.constexpr):
    """sums, 16 registers, plus B times the nibbles of one word of each of four rows."""
    return tl.inline_asm_elementwise(
        TILE_4 if BITS == 4 else TILE_8,
        TILE_REGISTERS,
        [w_0, w_1, w_2, w_3, b_0, b_1, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7],
         sums[8], sums[9], sums[10], sums[11], sums[12], sums[13], sums[14], sums[15]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32,
               tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def exchange(x, DISTANCE: tl.constexpr):
    """x of the lane whose number differs in the bit DISTANCE."""
    return tl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {DISTANCE}, 0x1f, 0xffffffff;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def from_lane(x, lane):
    """x of another lane of the warp."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def wanted(sums, first_wanted, second_wanted, J: tl.constexpr, BITS: tl.constexpr):
    """The J-th integers' part of sums that is in this lane's columns of B and of its group."""
    AT: tl.constexpr = 2 * J if BITS == 4 else 4 * J
    if BITS == 4:
        y = tl.where(first_wanted, sums[AT], 0.0) + tl.where(second_wanted, sums[AT + 1], 0.0)
    else:  # a low and a high nibble
        y = tl.where(first_wanted, sums[AT] + 16.0 * sums[AT + 2], 0.0)
        y += tl.where(second_wanted, sums[AT + 1] + 16.0 * sums[AT + 3], 0.0)
    return y


@triton.jit
def load_step(
    words, stride, scale, zero, groups_of_row, index, policy, DTYPE: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Words, scales and zeros of a lane's four rows, whose addresses for row 0 are words, scale and zero (int64).

    Of groups along the input their channels in place of scales and zeros.
    """
    i_0, i_1, i_2, i_3 = index
    size = 4 * stride
    w_0, w_1 = load_weights(address(words, i_0, size), policy), load_weights(address(words, i_1, size), policy)
    w_2, w_3 = load_weights(address(words, i_2, size), policy), load_weights(address(words, i_3, size), policy)
    s, z = index, index
    if META.GROUP_K == 0:
        s, z = load_meta(scale, zero, groups_of_row, index, DTYPE, META.BITS)
    return w_0, w_1, w_2, w_3, s, z


@triton.jit
def in_b(value, s, begin, end, GROUP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """B's column for an entry of x, as bits: times scale s. By input s is a channel: 0 unless begin <= s < end."""
    x = value.to(tl.float32, bitcast=True)
    if GROUP_K == 0:
        y = x * s
    elif COLUMNS == 1:
        y = x
    else:
        y = tl.where((s >= begin) & (s < end), x, 0.0)
    return y


@triton.jit
def whole_sum(sums_0, sums_1, sums_2, sums_3, own, c, COLUMNS: tl.constexpr, J: tl.constexpr, BITS: tl.constexpr):
    """The sum of the J-th integers of word c of a lane's 16 bytes, with columns own and own + COLUMNS of B."""
    # A lane's own columns of B are 2 c and 2 c + 1; wanted are the high and the low part.
    first_wanted = (2 * c == own) | (2 * c == own + COLUMNS)
    second_wanted = (2 * c + 1 == own) | (2 * c + 1 == own + COLUMNS)
    y_0 = wanted(sums_0, first_wanted, second_wanted, J, BITS)
    y_1 = wanted(sums_1, first_wanted, second_wanted, J, BITS)
    y_2 = wanted(sums_2, first_wanted, second_wanted, J, BITS)
    y_3 = wanted(sums_3, first_wanted, second_wanted, J, BITS)
    # Each of two exchanges halves the words a lane is concerned with.
    y_0, y_2 = tl.where(c < 2, y_0, y_2), tl.where(c < 2, y_2, y_0)
    y_1, y_3 = tl.where(c < 2, y_1, y_3), tl.where(c < 2, y_3, y_1)
    y_0 += exchange(y_2, 2)
    y_1 += exchange(y_3, 2)
    y_0, y_1 = tl.where(c % 2 == 0, y_0, y_1), tl.where(c % 2 == 0, y_1, y_0)
    return y_0 + exchange(y_1, 1)


@triton.jit
def of_column(correction, own, COLUMNS: tl.constexpr):
    """What lanes 4 n have for columns n = own and n = own + COLUMNS of B."""
    return from_lane(correction, 4 * own) + from_lane(correction, 4 * (own + COLUMNS))


@triton.jit
def store_sums(
    sums_0, sums_1, sums_2, sums_3, correction, p_row, column, end, p_scale, p_zero, K, N, group,
    COLUMNS: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Write what the lanes of a warp hold of its columns, from column on, to their places in p_row.

    Groups along the input, from number group on, meet their scales here.
    """
    BITS: tl.constexpr = META.BITS
    GROUP_N: tl.constexpr = META.GROUP_N
    lane = tl.arange(0, correction.shape[0])
    r, c = lane % 32 // 4, lane % 4
    WORDS: tl.constexpr = GROUP_N * BITS // 32
    w = column * BITS // 32 + 4 * r + c  # after the exchanges a lane has word c of its 16 bytes
    first = w // WORDS * GROUP_N + w % WORDS if BITS == 4 else 4 * w
    for j in tl.static_range(32 // BITS):
        at = first + (j * WORDS if BITS == 4 else j)
        y = tl.zeros_like(correction)
        if META.GROUP_K == 0:
            own = r * COLUMNS // 8  # the group of a lane's columns
            y = whole_sum(sums_0, sums_1, sums_2, sums_3, own, c, COLUMNS, j, BITS)
            y -= of_column(correction, own, COLUMNS) * (1.0 if BITS == 4 else 2304.0)  # 128 + 16 * 128 + 128
        else:
            for g in tl.static_range(COLUMNS):
                own = r * 0 + g
                scale, zero = load_column_scales(p_scale, p_zero, group + g, K, N, at, end, META)
                part = whole_sum(sums_0, sums_1, sums_2, sums_3, own, c, COLUMNS, j, BITS)
                y += scale * (part - of_column(correction, own, COLUMNS) * (zero if BITS == 4 else 2304.0))
        tl.store(p_row + at, y, mask=at < end)


@triton.jit
def make_b(
    value, s, begin, end, is_low, GROUP_K: tl.constexpr, COLUMNS: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    """A lane's two words of B, of its four values. ONE_ROW: what bf16 leaves of them where is_low."""
    v_0, v_1 = in_b(value[0], s[0], begin, end, GROUP_K, COLUMNS), in_b(value[1], s[1], begin, end, GROUP_K, COLUMNS)
    v_2, v_3 = in_b(value[2], s[2], begin, end, GROUP_K, COLUMNS), in_b(value[3], s[3], begin, end, GROUP_K, COLUMNS)
    b_0, b_1 = pair(v_0, v_1), pair(v_2, v_3)
    if ONE_ROW:
        b_0 = tl.where(is_low, pair(v_0 - low_of(b_0), v_1 - high_of(b_0)), b_0)
        b_1 = tl.where(is_low, pair(v_2 - low_of(b_1), v_3 - high_of(b_1)), b_1)
    return b_0, b_1


@triton.jit
def lane_addresses(p_weight, p_scale, p_zero, lane, start, end, COLUMNS: tl.constexpr, META: tl.constexpr):
    """Each lane's first column of weights in its warp, and addresses (int64) of its words, scale and zero in row 0."""
    BITS: tl.constexpr = META.BITS
    WARP_N: tl.constexpr = WARP_BYTES * 8 // BITS  # columns of a warp
    r = lane % 32 // 4
    column = start + lane // 32 * WARP_N
    word = tl.minimum((column * BITS // 32) + 4 * r, end * BITS // 32 - 4)
    words = (p_weight + word).to(tl.int64)
    group = tl.minimum(column // META.GROUP_N + r % COLUMNS, end // META.GROUP_N - 1)
    scale = (p_scale + group).to(tl.int64)
    zero = (p_zero + group).to(tl.int64) if BITS == 4 else scale
    return column, words, scale, zero


@triton.jit
def corrected(correction, b_0, b_1, z, META: tl.constexpr):
    """correction plus what a lane's two words of B add to it, with z as load_step returns them."""
    if (META.BITS == 4) & (META.GROUP_K == 0):
        correction += low_of(b_0) * z[0] + high_of(b_0) * z[1] + low_of(b_1) * z[2] + high_of(b_1) * z[3]
    else:
        correction += low_of(b_0) + high_of(b_0) + low_of(b_1) + high_of(b_1)
    return correction


@triton.jit
def sum_tiles(
    p_weight, stride, p_scale, p_zero, N, p_index, value_at, count, first, start, end,
    COLUMNS: tl.constexpr, ONE_ROW: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """A program's products of B and the weights of the listed channels.

    value_at: the address (int64) of a lane's four values, in the row of x that its column of B stands for. With ONE_ROW
    a second set of columns has what bf16 leaves of it. Returns 16 sums for each of a lane's four words, the zero-point
    correction, and each warp's first column of weights.
    """
    BITS: tl.constexpr = META.BITS
    GROUP_K: tl.constexpr = META.GROUP_K
    tl.static_assert(COLUMNS <= 4)  # B has eight, and each is needed twice
    dtype: tl.constexpr = p_scale.dtype.element_ty
    THREADS: tl.constexpr = META.BLOCK_N * BITS // 32
    lane = tl.arange(0, THREADS)
    r, c = lane % 32 // 4, lane % 4
    column, words, scale, zero = lane_addresses(p_weight, p_scale, p_zero, lane, start, end, COLUMNS, META)
    own = r % COLUMNS  # r is B's column here
    own_begin = (first // GROUP_K + own) * GROUP_K if GROUP_K else own
    own_end = own_begin + GROUP_K
    is_low = (r >= COLUMNS) & (r < 2 * COLUMNS)
    policy = leave_first(lane)
    nothing = tl.zeros([THREADS], tl.float32)
    sums = (nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing,
            nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)  # fmt: skip
    sums_0, sums_1, sums_2, sums_3 = sums, sums, sums, sums
    correction = nothing
    index_at = (p_index + 4 * c).to(tl.int64)
    last = tl.cdiv(count, STEP) * STEP
    groups = N // META.GROUP_N
    index = load_four(index_at)
    w_0, w_1, w_2, w_3, s, z = load_step(words, stride, scale, zero, groups, index, policy, dtype, META)
    value = load_four(value_at)
    index = load_four(index_at + 4 * STEP)
    for i in range(0, count, STEP):
        n_0, n_1, n_2, n_3, n_s, n_z = load_step(words, stride, scale, zero, groups, index, policy, dtype, META)
        n_value = load_four(value_at + 4 * (i + STEP))
        index = load_four(index_at + 4 * tl.minimum(i + 2 * STEP, last))
        keep_loads_above()
        b_0, b_1 = make_b(value, s, own_begin, own_end, is_low, GROUP_K, COLUMNS, ONE_ROW)
        correction = corrected(correction, b_0, b_1, z, META)
        sums_0 = add_tile(sums_0, w_0[0], w_1[0], w_2[0], w_3[0], b_0, b_1, BITS)
        sums_1 = add_tile(sums_1, w_0[1], w_1[1], w_2[1], w_3[1], b_0, b_1, BITS)
        sums_2 = add_tile(sums_2, w_0[2], w_1[2], w_2[2], w_3[2], b_0, b_1, BITS)
        sums_3 = add_tile(sums_3, w_0[3], w_1[3], w_2[3], w_3[3], b_0, b_1, BITS)
        w_0, w_1, w_2, w_3, s, z, value = n_0, n_1, n_2, n_3, n_s, n_z, n_value
    correction += exchange(correction, 1)
    correction += exchange(correction, 2)  # lanes 4 n + c have the whole of column n
    return sums_0, sums_1, sums_2, sums_3, correction, column


@triton.jit
def store_one_row_tensor_core(
    p_weight, stride, p_scale, p_zero, K, N, p_index, p_value, count, p_row, first, start, end,
    META: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As gather_quantized.store_one_row_quantized, for 16-bit scales and steps of 16 rows.

    As sum_rows_by_input, too, of channels from first on that touch SPAN groups.
    """
    # Of B, for a row of x: one for each group of channels, or for each in a warp's columns.
    COLUMNS: tl.constexpr = META.SPAN if META.GROUP_K else WARP_BYTES * 8 // META.BITS // META.GROUP_N
    c = tl.arange(0, META.BLOCK_N * META.BITS // 32) % 4  # of each lane
    sums_0, sums_1, sums_2, sums_3, correction, column = sum_tiles(
        p_weight, stride, p_scale, p_zero, N, p_index, (p_value + 4 * c).to(tl.int64), count, first, start, end,
        COLUMNS, True, META,
    )  # fmt: skip
    let_next_start(PDL)
    group = first // META.GROUP_K if META.GROUP_K else 0
    store_sums(
        sums_0, sums_1, sums_2, sums_3, correction, p_row, column, end, p_scale, p_zero, K, N, group,
        COLUMNS, META,
    )  # fmt: skip
