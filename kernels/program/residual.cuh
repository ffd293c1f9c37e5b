// The residual stream: every block keeps all of it in shared memory, in fp32, and adds what o and down give.
//
//     thread t    channels 2 t, 2 t + 1 | 2 (t + THREADS), 2 (t + THREADS) + 1 | ...
//
// So x itself never crosses blocks, only what is added to it.
#pragma once

namespace residual {

__device__ __forceinline__ int pair(int i) { return threadIdx.x + i * THREADS; }
__device__ __forceinline__ bool has(int i) { return pair(i) < HIDDEN / 2; }
__device__ __forceinline__ int channel(int i) { return 2 * pair(i / 2) + i % 2; }

// The sum of squares of this thread's channels, which x is set to.
__device__ float load(const u16* row, Shared& s) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < X_PAIRS; i++) {
        if (!has(i)) continue;
        const u32 bits = ((const u32*)row)[pair(i)];
        const float2 x = make_float2(low_of(bits), high_of(bits));
        ((float2*)s.x)[pair(i)] = x;
        squares += x.x * x.x + x.y * x.y;
    }
    return squares;
}

// As load, after adding a vector of words.
__device__ __forceinline__ float add(const u64* delta, u32 epoch, Shared& s) {
    float2 d[X_PAIRS];
    receive(d, epoch, [&](int i) { return delta + 2 * pair(i); }, [](int i) { return has(i); });
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < X_PAIRS; i++) {
        if (!has(i)) continue;
        float2 x = ((const float2*)s.x)[pair(i)];
        x.x += d[i].x, x.y += d[i].y;
        ((float2*)s.x)[pair(i)] = x;
        squares += x.x * x.x + x.y * x.y;
    }
    return squares;
}

// What RMSNorm multiplies x with. All of x is there for all threads afterwards.
__device__ __forceinline__ float norm_scale(float squares, Shared& s) {
    return rsqrtf(sum_of_block(squares, s) / HIDDEN + NORM_EPS);
}

// RMSNorm, rounded as the module does.
__device__ __forceinline__ float normed(float x, float scale, float weight) {
    return rounded(rounded(x * scale) * weight);
}

// A norm's weights of this thread's channels: asked for before what it is to norm is there.
__device__ __forceinline__ void load_weight(u32 (&w)[X_PAIRS], const u16* weight) {
#pragma unroll
    for (int i = 0; i < X_PAIRS; i++) w[i] = has(i) ? ((const u32*)weight)[pair(i)] : 0;
}

// This thread's channels, normed.
__device__ __forceinline__ void normed_pairs(float (&y)[2 * X_PAIRS], const u32 (&w)[X_PAIRS], float scale,
                                             const Shared& s) {
#pragma unroll
    for (int i = 0; i < X_PAIRS; i++) {
        const float2 x = has(i) ? ((const float2*)s.x)[pair(i)] : make_float2(0.0f, 0.0f);
        y[2 * i] = normed(x.x, scale, low_of(w[i])), y[2 * i + 1] = normed(x.y, scale, high_of(w[i]));
    }
}

// The bits of y's entries that reach the threshold.
__device__ __forceinline__ u32 kept(const float (&y)[2 * X_PAIRS], float threshold) {
    u32 keep = 0;
#pragma unroll
    for (int i = 0; i < 2 * X_PAIRS; i++)
        if (has(i / 2) && is_kept(y[i], threshold)) keep |= 1u << i;
    return keep;
}

}  // namespace residual
