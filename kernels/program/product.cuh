// A product cut along its input: block (piece, split) sums its share of the channels over its piece of the columns.
//
//     partial sums    fours [SPLITS][N / 4] (exchange.cuh), written by the blocks of each split
//     reduce          the owner of four columns (residual.cuh) adds them up over all splits
//
// No atomics: the order of every sum is fixed, so its bits are.
#pragma once

// Gather piece number piece over the list and send the sums as those of split. panel: of type P, whose first granule is
// first_granule. before_sending: what must have happened.
template <class P, int PIECE, class Meanwhile, class Before>
__device__ __forceinline__ void product(const Matrix& m, int piece, const u32* panel, int first_granule, int split,
                                        Listed listed, uint4* partials, u32 epoch, Shared& s, Meanwhile meanwhile,
                                        Before before_sending) {
    using W = typename P::W;
    const int first_group = P::first_input_group(split);
    auto part = [&](const Place<W, PIECE>& place) -> Part {
        const int granule = piece * PIECE + place.granule;
        const u32* const words = W::BY_INPUT ? scales_by_input<P>(m, panel, first_group, first_granule, granule)
                                             : scales_by_output<P>(m, panel, first_granule, granule);
        return {m.values + granule * 16, words, granule < W::GRANULES, 0.0f};
    };
    SumsOf<W> sums;
    gather<W, PIECE, false, P::HAS_PLACES, P::STRIDE>(sums, part, s.list(listed, first_group), s.ring,
                                                      s.ring_words[0][0], meanwhile);
    const float unscale = (float)m.unscale / listed.enlarged;
    __syncthreads();
    lay_out_sums<P, PIECE>(sums, part, first_group, s.slots);
    before_sending();
    __syncthreads();
    uint4* const row = partials + (u64)split * (W::N / 4);
    for (int four = threadIdx.x; four < PIECE * W::COLUMNS / 4; four += THREADS) {
        const int at = piece * PIECE + 4 * four / W::COLUMNS;
        if (at >= W::GRANULES) continue;
        send(row + W::column(at, 4 * four % W::COLUMNS) / 4, sum_of_slots<W, PIECE>(s.slots, four, unscale), epoch);
    }
}

// The sums of all splits, of the four columns that a thread owns; 0 in other threads.
//
//     thread    part of the splits (a power of two to a warp), four of the block's
template <int SPLITS>
__device__ __forceinline__ float4 reduce(const uint4* partials, u32 epoch, Shared& s) {
    using namespace residual;
    constexpr int ROOM = next_power_of_two(OWN_FOURS), PARTS = THREADS / ROOM, LOADS = ceil_div(SPLITS, PARTS);
    constexpr int SUMS = ROOM < 32 ? WARPS : PARTS;  // after those of a warp
    const int part = threadIdx.x / ROOM, own = threadIdx.x % ROOM, four = blockIdx.x * OWN_FOURS + own;
    const bool live = own < OWN_FOURS && four < FOURS;
    float4 loaded[LOADS], total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    receive(
        loaded, epoch, [&](int i) { return partials + (u64)(part + i * PARTS) * FOURS + four; },
        [&](int i) { return live && part + i * PARTS < SPLITS; });
#pragma unroll
    for (int i = 0; i < LOADS; i++)
        if (part + i * PARTS < SPLITS) add_to(total, loaded[i]);
#pragma unroll
    for (int distance = ROOM; distance < 32; distance *= 2) add_to(total, from_lane_xor(total, distance));
    if (ROOM >= 32 || lane_of_warp() < ROOM) s.parts[ROOM < 32 ? warp_of_block() * ROOM + own : threadIdx.x] = total;
    __syncthreads();
    total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (!owns()) return total;
#pragma unroll 8
    for (int i = 0; i < SUMS; i++) add_to(total, s.parts[i * ROOM + own]);
    return total;
}

__device__ __forceinline__ float bias_of(const Matrix& m, int column) {
    return m.bias ? float_of(m.bias[column]) : 0.0f;
}
__device__ __forceinline__ void add_bias(float4& x, const Matrix& m, int column) {
    add_to(x, make_float4(bias_of(m, column), bias_of(m, column + 1), bias_of(m, column + 2), bias_of(m, column + 3)));
}
