// The residual stream x, in fp32. Each column has an owner: a block that adds up what o and down give, adds that to x,
// and sends x to all. The others take what they list of it.
//
//     owner b     columns b * 4 OWN_FOURS ... , four of each of its first OWN_FOURS threads, in registers
//     sent        fours [HIDDEN / 4], then one for the sum of squares of each warp that has columns
//
// So no block but the owner adds up squares of columns that it does not list.
#pragma once

namespace residual {

constexpr int FOURS = HIDDEN / 4, OWN_FOURS = ceil_div(FOURS, GRID), OWNERS = ceil_div(FOURS, OWN_FOURS);
constexpr int OWN_WARPS = ceil_div(OWN_FOURS, 32), SQUARES = OWNERS * OWN_WARPS;
constexpr int SENT = FOURS + SQUARES;  // fours
static_assert(OWN_FOURS <= THREADS, "too few blocks for so many columns");

// The four that this thread owns, if it owns one.
__device__ __forceinline__ int own_four() { return blockIdx.x * OWN_FOURS + threadIdx.x; }
__device__ __forceinline__ bool owns() { return threadIdx.x < OWN_FOURS && own_four() < FOURS; }

// Of a token's row of the embedding.
__device__ __forceinline__ float4 load_own(const u8* embedding, i64 token) {
    if (!owns()) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const u8* const row = embedding + token * HIDDEN * (EMBEDDING_BITS / 8);
    if (EMBEDDING_BITS == 32) return ((const float4*)row)[own_four()];
    const uint2 bits = ((const uint2*)row)[own_four()];
    return make_float4(low_of(bits.x), high_of(bits.x), low_of(bits.y), high_of(bits.y));
}

// This thread's four, and its warp's squares. All lanes of a warp call it together.
__device__ __forceinline__ void send_own(const float4& x, uint4* to, u32 epoch) {
    if (owns()) send(to + own_four(), x, epoch);
    const float squares = sum_of_warp(owns() ? x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w : 0.0f);
    if (warp_of_block() < OWN_WARPS && lane_of_warp() == 0 && (int)blockIdx.x < OWNERS)
        send(to + FOURS + blockIdx.x * OWN_WARPS + warp_of_block(), make_float4(squares, 0.0f, 0.0f, 0.0f), epoch);
}

// A thread's part of x: COUNT fours of channels, number four(i) where has(i). A norm's weights of them are asked for
// before x is there.
template <int COUNT>
struct Part {
    uint2 weight[COUNT];

    template <class Four, class Has>
    __device__ __forceinline__ void load_weight(const u16* from, Four four, Has has) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) weight[i] = has(i) ? ((const uint2*)from)[four(i)] : uint2{0, 0};
    }

    // x, normed, once it is there. The block's threads have met by then.
    template <class Four, class Has>
    __device__ __forceinline__ void receive_normed(float (&y)[4 * COUNT], const uint4* from, Four four, Has has,
                                                   u32 epoch, Shared& s) const {
        constexpr int OF_SQUARES = ceil_div(SQUARES, THREADS);
        float4 x[COUNT + OF_SQUARES];
        auto square = [](int i) { return (int)threadIdx.x + (i - COUNT) * THREADS; };
        receive(
            x, epoch, [&](int i) { return from + (i < COUNT ? four(i) : FOURS + square(i)); },
            [&](int i) { return i < COUNT ? has(i) : square(i) < SQUARES; });
        float squares = 0.0f;
#pragma unroll
        for (int i = COUNT; i < COUNT + OF_SQUARES; i++) squares += square(i) < SQUARES ? x[i].x : 0.0f;
        const float scale = rsqrtf(sum_of_block(squares, s) / HIDDEN + NORM_EPS);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            y[4 * i] = normed(x[i].x, scale, low_of(weight[i].x));
            y[4 * i + 1] = normed(x[i].y, scale, high_of(weight[i].x));
            y[4 * i + 2] = normed(x[i].z, scale, low_of(weight[i].y));
            y[4 * i + 3] = normed(x[i].w, scale, high_of(weight[i].y));
        }
    }
};

}  // namespace residual
