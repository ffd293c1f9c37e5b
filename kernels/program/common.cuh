// Rounding and the thread's place, for all files of the decode program. No headers: NVRTC brings none.
#pragma once

constexpr int WARPS = THREADS / 32;  // of the one block on a multiprocessor
constexpr u32 ALL_LANES = 0xffffffff;
#define NOTHING __int_as_float(0xff800000)  // minus infinity
constexpr u32 NAN_BITS = 0x7fc00000;        // above those of all numbers

__device__ __forceinline__ int warp_of_block() { return threadIdx.x >> 5; }
__device__ __forceinline__ int lane_of_warp() { return threadIdx.x & 31; }
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int power_of_two(int x) { return x < 2 ? 1 : 2 * power_of_two(x / 2); }  // x or less
__host__ __device__ constexpr int next_power_of_two(int x) { return x < 2 ? 1 : 2 * next_power_of_two((x + 1) / 2); }
__host__ __device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

// The model's 16-bit floats by their bits; FLOAT_IS_BF16 comes from the generated config.
__device__ __forceinline__ u16 bits_of(float x) { return FLOAT_IS_BF16 ? bf16_bits(x) : fp16_bits(x); }

__device__ __forceinline__ float float_of(u16 bits) {
    return FLOAT_IS_BF16 ? __uint_as_float((u32)bits << 16) : from_fp16(bits);
}

__device__ __forceinline__ float low_of(u32 pair) {
    return FLOAT_IS_BF16 ? __uint_as_float(pair << 16) : float_of((u16)pair);
}
__device__ __forceinline__ float high_of(u32 pair) {
    return FLOAT_IS_BF16 ? __uint_as_float(pair & 0xffff0000) : float_of((u16)(pair >> 16));
}

// Two of them in a word, low in the lower half.
__device__ __forceinline__ u32 pair_of(float low, float high) {
    return FLOAT_IS_BF16 ? bf16_pair(low, high) : fp16_pair(low, high);
}

// Signed byte number i of a word: 2^23 + q + 128 by its bits, less what is too much.
__device__ __forceinline__ float signed_byte(u32 word, int i) {
    return __uint_as_float(__byte_perm(word ^ 0x80808080, 0x4b000000, 0x7440 | i)) - 8388736.0f;
}

// x rounded to the model's dtype, as its layers round what they hand on.
__device__ __forceinline__ float rounded(float x) { return float_of(bits_of(x)); }

// RMSNorm, rounded as the module does.
__device__ __forceinline__ float normed(float x, float scale, float weight) {
    return rounded(rounded(x * scale) * weight);
}

// A NaN is never below a threshold: it is kept.
__device__ __forceinline__ bool is_kept(float x, float threshold) { return !(fabsf(x) < threshold); }

__device__ __forceinline__ void read_four(float (&to)[4], const float* from) {
    const float4 x = *(const float4*)from;
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ void read_four(u32 (&to)[4], const u16* from) {
    const ushort4 x = *(const ushort4*)from;
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

__device__ __forceinline__ void widen(float (&to)[8], const uint4& from) {
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) to[2 * i] = low_of(words[i]), to[2 * i + 1] = high_of(words[i]);
}

// So many bytes, to which from is aligned, into the lowest of the words.
template <int BYTES, int COUNT>
__device__ __forceinline__ void read_bytes(u32 (&to)[COUNT], const void* from) {
    static_assert(COUNT == ceil_div(BYTES, 4), "words have room for other bytes");
    if constexpr (BYTES == 16) {
        const uint4 x = *(const uint4*)from;
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    } else if constexpr (BYTES == 8) {
        const uint2 x = *(const uint2*)from;
        to[0] = x.x, to[1] = x.y;
    } else if constexpr (BYTES == 4) {
        to[0] = *(const u32*)from;
    } else {
        to[0] = *(const u16*)from;
    }
}

__device__ __forceinline__ void add_to(float4& sum, const float4& x) {
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}
__device__ __forceinline__ float4 times(const float4& x, float y) {
    return make_float4(x.x * y, x.y * y, x.z * y, x.w * y);
}
__device__ __forceinline__ float4 from_lane_xor(const float4& x, int distance) {
    return make_float4(__shfl_xor_sync(ALL_LANES, x.x, distance), __shfl_xor_sync(ALL_LANES, x.y, distance),
                       __shfl_xor_sync(ALL_LANES, x.z, distance), __shfl_xor_sync(ALL_LANES, x.w, distance));
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int distance = 16; distance; distance >>= 1) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}
