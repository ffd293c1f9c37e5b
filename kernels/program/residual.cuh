// The residual stream: every block keeps all of it in registers, in fp32, and adds what o and down give.
//
//     thread t    channels 2 t, 2 t + 1 | 2 (t + THREADS), 2 (t + THREADS) + 1 | ...
//
// So x itself never crosses blocks, only what is added to it.
#pragma once

struct Residual {
    float2 x[X_PAIRS];

    static __device__ __forceinline__ int pair(int i) { return threadIdx.x + i * THREADS; }
    static __device__ __forceinline__ bool has(int i) { return pair(i) < HIDDEN / 2; }
    static __device__ __forceinline__ int channel(int i) { return 2 * pair(i / 2) + i % 2; }

    __device__ void load(const u16* row) {
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) {
            const u32 bits = has(i) ? ((const u32*)row)[pair(i)] : 0;
            x[i] = make_float2(low_of(bits), high_of(bits));
        }
    }

    // A norm's weights: asked for before what it is to norm is there.
    static __device__ __forceinline__ void load_weight(u32 (&w)[X_PAIRS], const u16* weight) {
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) w[i] = has(i) ? ((const u32*)weight)[pair(i)] : 0;
    }

    __device__ __forceinline__ void add(const u64* delta, u32 epoch) {
        float2 d[X_PAIRS];
        receive(d, epoch, [&](int i) { return delta + 2 * pair(i); }, [](int i) { return has(i); });
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) x[i].x += d[i].x, x[i].y += d[i].y;
    }

    // y = RMSNorm(x) * weight, rounded as the module does. Holds a __syncthreads.
    __device__ __forceinline__ void normed(float (&y)[2 * X_PAIRS], const u32 (&w)[X_PAIRS], Shared& s) const {
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) squares += x[i].x * x[i].x + x[i].y * x[i].y;
        const float scale = rsqrtf(sum_of_block(squares, s) / HIDDEN + NORM_EPS);
#pragma unroll
        for (int i = 0; i < X_PAIRS; i++) {
            y[2 * i] = rounded(rounded(x[i].x * scale) * low_of(w[i]));
            y[2 * i + 1] = rounded(rounded(x[i].y * scale) * high_of(w[i]));
        }
    }
};

// The bits of y's entries that reach the threshold and are this part's: neighbouring pairs go to different parts, so
// that a cluster of large activations does not leave one part with most of the work.
__device__ __forceinline__ u32 kept(const float (&y)[2 * X_PAIRS], float threshold, int part, int parts) {
    u32 keep = 0;
#pragma unroll
    for (int i = 0; i < 2 * X_PAIRS; i++) {
        const int pair = Residual::pair(i / 2);
        if (Residual::has(i / 2) && pair % parts == part && is_kept(y[i], threshold)) keep |= 1u << i;
    }
    return keep;
}
