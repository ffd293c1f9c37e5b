// Weights [K, N] as kernels/formats/packing.py lays them out, and the arithmetic of 16 bytes of a row: a granule.
//
//     bits   columns of a granule   lanes that sum one granule together
//     16     8                      1      fused multiply-adds in fp32
//     8      16                     1      a byte becomes a float by a permutation and one subtraction
//     4      32                     4      tensor cores, see Sums<4>
//
// A quantized weight's scales come as one word for each group, made once by the host ("meta"): for 8 bits the scale as
// fp32, for 4 bits the scale's 16 bits above the zero point. So a lane reads 4 bytes beside its 16, of one sector.
#pragma once

struct Matrix {
    const u8* values;
    const u32* meta;          // [K, N / GROUP], null for floats
    const float* thresholds;  // one for each segment of the output
    const u16* bias;          // [N] or null
    i64 segments;             // 1: one threshold for all
};

template <int K_, int N_, int BITS_, int GROUP_>
struct Format {
    static constexpr int K = K_, N = N_, BITS = BITS_, GROUP = GROUP_;
    static constexpr int COLUMNS = 128 / BITS;
    static constexpr int ROW_BYTES = N / 8 * BITS;
    static constexpr int GRANULES = ROW_BYTES / 16;
    static constexpr int GROUPS = BITS == 16 ? 0 : N / GROUP;
    static constexpr int GRANULES_OF_GROUP = BITS == 16 ? 1 : GROUP / COLUMNS;
    static constexpr int TEAM = BITS == 4 ? 4 : 1;
    static constexpr int TEAMS = THREADS / TEAM;

    // The column of a granule's value i. Values 2 i and 2 i + 1 are neighbours in every format.
    static __device__ __forceinline__ int column(int granule, int i) {
        if (BITS != 4) return granule * COLUMNS + i;
        const int group = granule / GRANULES_OF_GROUP, word = granule % GRANULES_OF_GROUP * 4 + i % 4;
        return group * GROUP + i / 4 * (GROUP / 8) + word;
    }
};

template <int BITS>
struct Sums;

template <>
struct Sums<16> {
    float sum[8] = {};

    __device__ __forceinline__ void add(const uint4 (&rows)[4], const u32 (&)[4], const float (&x)[4]) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u32 words[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
#pragma unroll
            for (int w = 0; w < 4; w++) {
                sum[2 * w] += x[r] * low_of(words[w]);
                sum[2 * w + 1] += x[r] * high_of(words[w]);
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

    __device__ __forceinline__ void add(const uint4 (&rows)[4], const u32 (&meta)[4], const float (&x)[4]) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u32 words[4] = {rows[r].x, rows[r].y, rows[r].z, rows[r].w};
            const float a = x[r] * __uint_as_float(meta[r]);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const u32 unsigned_bytes = words[w] ^ 0x80808080;  // q + 128
#pragma unroll
                for (int b = 0; b < 4; b++) {  // 2^23 + q + 128 by its bits
                    const float q = __uint_as_float(__byte_perm(unsigned_bytes, 0x4b000000, 0x7440 | b));
                    sum[4 * w + b] += a * (q - 8388736.0f);
                }
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
// anything, and they lie in lane c = g / 2. Seven eighths of the tensor cores' work is wasted, which they have to spare.
//
//     A[g]   = nibbles of lanes 4 g .. 4 g + 3        B[.][g] = x scale of lanes 4 g .. 4 g + 3
//
// A nibble n becomes the bf16 128 + n by one logical operation for two of them; the sum of x scale (128 + zero) is kept
// beside and taken off at the end. x scale is the sum of two bf16, since one would leave an error of 1e-3.
template <>
struct Sums<4> {
    float sum[64] = {};  // tile t = word, half and pair of nibbles: sum[4 t ..] are its four results in this lane
    float correction = 0.0f;

    __device__ __forceinline__ void scale_inputs(const u32 (&meta)[4], const float (&x)[4], u32 (&high)[2],
                                                 u32 (&low)[2]) {
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
            const float a = x[r] * high_of(meta[r]), b = x[r + 1] * high_of(meta[r + 1]);
            high[r / 2] = bf16_pair(a, b);
            const float a_high = __uint_as_float(high[r / 2] << 16), b_high = __uint_as_float(high[r / 2] & 0xffff0000);
            low[r / 2] = bf16_pair(a - a_high, b - b_high);
            const float a_low = __uint_as_float(low[r / 2] << 16), b_low = __uint_as_float(low[r / 2] & 0xffff0000);
            correction += (a_high + a_low) * __uint_as_float(0x43000000 | (meta[r] & 0xff) << 16);
            correction += (b_high + b_low) * __uint_as_float(0x43000000 | (meta[r + 1] & 0xff) << 16);
        }
    }

    __device__ __forceinline__ void add(const uint4 (&rows)[4], const u32 (&meta)[4], const float (&x)[4]) {
        u32 high[2], low[2];
        scale_inputs(meta, x, high, low);
        const u32 words[4][4] = {{rows[0].x, rows[1].x, rows[2].x, rows[3].x},
                                 {rows[0].y, rows[1].y, rows[2].y, rows[3].y},
                                 {rows[0].z, rows[1].z, rows[2].z, rows[3].z},
                                 {rows[0].w, rows[1].w, rows[2].w, rows[3].w}};
#pragma unroll
        for (int w = 0; w < 4; w++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 first = __byte_perm(words[w][0], words[w][1], half ? 0x7632 : 0x5410);
                const u32 second = __byte_perm(words[w][2], words[w][3], half ? 0x7632 : 0x5410);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    u32 a[4];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        a[i] = ((i < 2 ? first : second) >> (8 * pair + 4 * (i % 2)) & 0x000f000f) | 0x43004300;
                    float* d = sum + 4 * ((w * 2 + half) * 2 + pair);
                    multiply_add(d, a, high);
                    multiply_add(d, a, low);
                }
            }
        }
    }

    // out[4 n + w]: nibble n of word w. Returns whether this lane is the one of its four that has them.
    __device__ __forceinline__ bool finish(float (&out)[32]) {
        correction += __shfl_xor_sync(ALL_LANES, correction, 1);
        correction += __shfl_xor_sync(ALL_LANES, correction, 2);
        const int g = lane_of_warp() >> 2, c = lane_of_warp() & 3;
#pragma unroll
        for (int w = 0; w < 4; w++) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float* d = sum + 4 * ((w * 2 + n / 4) * 2 + n % 4 / 2) + 2 * (n % 2);
                out[4 * n + w] = (g % 2 ? d[1] : d[0]) - correction;
            }
        }
        return c == g / 2;
    }
};
