// Weights [K, N] as kernels/formats/packing.py lays them out, and the arithmetic of 16 bytes of a row: a granule.
//
//     bits   columns of a granule   lanes that sum one granule together
//     16     8                      1      fused multiply-adds in fp32
//     8      16                     1      a byte becomes a float by a permutation and one subtraction
//     4      32                     4      tensor cores, see Sums<4>: those above would be three instructions a weight
//
// A quantized weight's scales come as one word for each group, made once by the host ("meta"). For 8 bits it is the
// scale as fp32. For 4 bits it is 16 bits of the scale, times a power of two (Matrix::unscale), above the zero point as
// fp16. What meets the weights of a row is a word, too, made of an input x and such a scale (Format::word):
//
//     16 bits    x
//      8 bits    x scale
//      4 bits    x scale as fp16 below the zero point as fp16; of groups along the input, x as fp16
//
// A refined channel has a second row among those from K on (packing.py, 5). Both meet the same x.
#pragma once

struct Matrix {
    const u8* values;
    const u32* meta;          // [rows, N / GROUP], of gate and up [N / GROUP, GATE_UP_ROWS]; null for floats. Of groups
                              // along the input [K / GROUP_CHANNELS, N]
    const u32* second;        // [K] of refined channels (Seconds, shared.cuh); null where a product has none
    const u32* second_meta;   // of their second rows as panels have it: [parts][SECONDS][N / GROUP], of gate and up
                              // [parts][N / GROUP][SECONDS]
    const float* thresholds;  // one for each segment of the output
    const u16* bias;          // [N] or null
    i64 segments;             // 1: one threshold for all
    double unscale;           // what 4-bit sums are multiplied with, since their scales were enlarged
};

// GROUP: columns to a scale. GROUP_CHANNELS: channels to one, of groups along the input; 0 of others. GROUP is how many
// columns are packed together then.
template <int K_, int N_, int BITS_, int GROUP_, int GROUP_CHANNELS_>
struct Format {
    static constexpr int K = K_, N = N_, BITS = BITS_, GROUP = GROUP_, GROUP_CHANNELS = GROUP_CHANNELS_;
    static constexpr bool BY_INPUT = GROUP_CHANNELS > 0;
    static constexpr int COLUMNS = 128 / BITS;
    static constexpr int ROW_BYTES = N / 8 * BITS;
    static constexpr int GRANULES = ROW_BYTES / 16;
    static constexpr int GROUPS = BITS == 16 ? 0 : N / GROUP;
    static constexpr int GRANULES_OF_GROUP = BITS == 16 ? 1 : GROUP / COLUMNS;
    static constexpr int TEAM = BITS == 4 ? 4 : 1;
    static constexpr int TEAMS = THREADS / TEAM;

    // The column of a granule's value i. Values 4 i to 4 i + 3 are neighbours in every format.
    static __device__ __forceinline__ int column(int granule, int i) {
        if (BITS != 4) return granule * COLUMNS + i;
        const int group = granule / GRANULES_OF_GROUP, word = granule % GRANULES_OF_GROUP * 4 + i % 4;
        return group * GROUP + i / 4 * (GROUP / 8) + word;
    }

    static __device__ __forceinline__ u32 word(float x, u32 meta) {
        if (BITS == 16) return __float_as_uint(x);
        if (BITS == 8) return __float_as_uint(x * __uint_as_float(meta));
        return BY_INPUT ? fp16_bits(x) : fp16_bits(x * high_of(meta)) | meta << 16;
    }
};

template <int BITS, bool BY_INPUT = false>
struct Sums;
template <class W>
using SumsOf = Sums<W::BITS, W::BY_INPUT>;

template <>
struct Sums<16> {
    float sum[8] = {};

    __device__ __forceinline__ void add(const uint4 (&rows)[4], const u32 (&factors)[4]) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u32 words[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
            const float x = __uint_as_float(factors[r]);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                sum[2 * w] += x * low_of(words[w]);
                sum[2 * w + 1] += x * high_of(words[w]);
            }
        }
    }

    __device__ __forceinline__ bool finish(float (&out)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = sum[i];
        return true;
    }
};

template <>
struct Sums<8> {
    float sum[16] = {};

    __device__ __forceinline__ void add(const uint4 (&rows)[4], const u32 (&factors)[4]) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u32 words[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
            const float x = __uint_as_float(factors[r]);
#pragma unroll
            for (int w = 0; w < 4; w++) {
#pragma unroll
                for (int b = 0; b < 4; b++) sum[4 * w + b] += x * signed_byte(words[w], b);
            }
        }
    }

    __device__ __forceinline__ bool finish(float (&out)[16]) {
#pragma unroll
        for (int i = 0; i < 16; i++) out[i] = sum[i];
        return true;
    }
};

// 4 bits on tensor cores (mma.m16n8k16, sums in fp32). Lane 4 g + c has four rows of weights of its own; the four lanes
// of a g have one granule. A's rows g and g + 8 are two columns of W, taken from those lanes' words; its depth is their
// 16 rows. B's column g is x times scale of the very same rows. So of the product only D[g][g] and D[g + 8][g] mean
// anything, and they lie in lane c = g / 2. Seven eighths of the tensor cores' work is wasted, and they can spare it.
//
//     A[g]   = nibbles of lanes 4 g .. 4 g + 3        B[.][g] = x scale of lanes 4 g .. 4 g + 3
//
// One logical operation makes fp16 of two nibbles, by their bits: 1024 + n of a low one, 1024 + 16 n of a high one.
// What that adds, and the zero points, one more product gives: zero points in A's row g, ones in row g + 8. It is taken
// off at the end. x scale is rounded to fp16, 2^-12 of it. The list's values (compact) and the scales have been
// multiplied by powers of two to fill its range.
template <>
struct Sums<4> {
    float sum[64] = {};  // tile t = word, half and pair of nibbles: sum[4 t ..] are its four results in this lane
    float beside[4] = {};

    __device__ __forceinline__ void add(const uint4 (&rows)[4], const u32 (&factors)[4]) {
        constexpr u32 ONES = 0x3c003c00;
        const u32 b[2] = {__byte_perm(factors[0], factors[1], 0x5410), __byte_perm(factors[2], factors[3], 0x5410)};
        multiply_add<false>(beside, {__byte_perm(factors[0], factors[1], 0x7632), ONES,
                              __byte_perm(factors[2], factors[3], 0x7632), ONES}, b);
        const u32 words[4][4] = {{rows[0].x, rows[1].x, rows[2].x, rows[3].x},
                                 {rows[0].y, rows[1].y, rows[2].y, rows[3].y},
                                 {rows[0].z, rows[1].z, rows[2].z, rows[3].z},
                                 {rows[0].w, rows[1].w, rows[2].w, rows[3].w}};
#pragma unroll
        for (int w = 0; w < 4; w++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 first = __byte_perm(words[w][0], words[w][1], half ? 0x7632 : 0x5410);
                u32 second = __byte_perm(words[w][2], words[w][3], half ? 0x7632 : 0x5410);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    multiply_add<false>(sum + 4 * ((w * 2 + half) * 2 + pair),
                                 {low_nibbles(first), high_nibbles(first), low_nibbles(second), high_nibbles(second)},
                                 b);
                    first >>= 8, second >>= 8;
                }
            }
        }
    }

    // out[4 n + w]: nibble n of word w. Returns whether this lane is the one of its four that has them.
    __device__ __forceinline__ bool finish(float (&out)[32]) {
        const int g = lane_of_warp() >> 2, c = lane_of_warp() & 3;
        const float zeros = g % 2 ? beside[1] : beside[0], inputs = g % 2 ? beside[3] : beside[2];
#pragma unroll
        for (int w = 0; w < 4; w++) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float* d = sum + 4 * ((w * 2 + n / 4) * 2 + n % 4 / 2) + 2 * (n % 2);
                const float own = g % 2 ? d[1] : d[0];
                out[4 * n + w] = n % 2 ? own / 16 - 64 * inputs - zeros : own - 1024 * inputs - zeros;
            }
        }
        return c == g / 2;
    }
};

// Groups along the input. A warp's granules meet the same rows of one list then. So column j of B can be x in group
// first + j of the channels, 0 elsewhere, and all of D means something:
//
//     D[g][j]                    sum of nibbles of granule g over the channels of group j, in lane 4 g + j / 2
//     beside: D[g + 8][j]        sum of x over them
//
// Scales and zero points come in once, at the end.
template <>
struct Sums<4, true> : Sums<4> {
    // Columns 8 c .. 8 c + 7 of its granule for lane 4 g + c. words: of the granule's columns in the first group; the
    // next group's are stride further on.
    __device__ __forceinline__ void finish_groups(float (&out)[8], const u32* words, int stride, int groups) {
        const int c = lane_of_warp() & 3;
        float total[32] = {};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float inputs = beside[2 + half];
            if (2 * c + half >= groups) continue;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const uint4 four = *(const uint4*)(words + (2 * c + half) * stride + 4 * n);
                const u32 of_word[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    const float d = sum[4 * ((w * 2 + n / 4) * 2 + n % 4 / 2) + 2 * (n % 2) + half];
                    const float zero = from_fp16((u16)of_word[w]);
                    const float own = n % 2 ? d / 16 - (64 + zero) * inputs : d - (1024 + zero) * inputs;
                    total[4 * n + w] += high_of(of_word[w]) * own;
                }
            }
        }
        float mine[16];
#pragma unroll
        for (int i = 0; i < 16; i++) mine[i] = exchange(total[i], total[16 + i], c & 2, 2);
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = exchange(mine[i], mine[8 + i], c & 1, 1);
    }

    // What this lane keeps of two sums, the second if takes_second, and what its neighbour has of it.
    static __device__ __forceinline__ float exchange(float first, float second, bool takes_second, int distance) {
        return (takes_second ? second : first) +
               __shfl_xor_sync(ALL_LANES, takes_second ? first : second, distance);
    }
};
