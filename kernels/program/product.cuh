// A product cut along its input: block (piece, split) sums its share of the channels over its piece of the columns.
//
//     partial sums    u64 [SPLITS][N] words (exchange.cuh), written by the blocks of each split
//     reduce          block r adds columns r * 2 PAIRS ... of all splits, in their order, and sends the results on
//
// Two trips of half a microsecond, and no atomics: the order of every sum is fixed, so its bits are.
#pragma once

// Gather piece number piece over the list and send the sums as those of split. The panel's rows are STRIDE apart, that
// of first_group first. before_sending: what must have happened.
template <class W, int PIECE, int STRIDE, class Before>
__device__ __forceinline__ void product(const Matrix& m, int piece, int first_group, int split, Listed listed,
                                        u64* partials, u32 epoch, Shared& s, Before before_sending) {
    auto part = [&](const Place<W, PIECE>& place) -> Part {
        const int granule = piece * PIECE + place.granule, group = granule / W::GRANULES_OF_GROUP;
        const u32* const meta = SCALED ? s.panel + (group - first_group) * STRIDE : m.meta + group;
        return {m.values + granule * 16, meta, granule < W::GRANULES, 0.0f};
    };
    Sums<W::BITS> sums;
    gather<W, PIECE, false, HAS_PANEL<W>>(sums, part, s.list(listed), s.ring, s.ring_words[0][0]);
    const float unscale = (float)m.unscale / listed.enlarged;
    __syncthreads();
    lay_out<W, PIECE>(sums, s.slots);
    before_sending();
    __syncthreads();
    u64* const row = partials + (u64)split * W::N;
    for (int pair = threadIdx.x; pair < PIECE * W::COLUMNS / 2; pair += THREADS) {
        const int at = piece * PIECE + 2 * pair / W::COLUMNS;
        if (at >= W::GRANULES) continue;
        const float2 sum = sum_of_slots<W, PIECE>(s.slots, pair, unscale);
        send(row + W::column(at, 2 * pair % W::COLUMNS), sum.x, sum.y, epoch);
    }
}

// finish(column, sums of column and column + 1) for the columns that this block adds up.
template <int N, int SPLITS, class Finish>
__device__ __forceinline__ void reduce(const u64* partials, u32 epoch, Shared& s, Finish finish) {
    constexpr int PAIRS = ceil_div(N / 2, GRID), PARTS = SPLITS < THREADS / PAIRS ? SPLITS : THREADS / PAIRS;
    constexpr int LOADS = ceil_div(SPLITS, PARTS);
    static_assert(PAIRS <= THREADS, "too few blocks for so many columns");
    if ((int)blockIdx.x * PAIRS >= N / 2) return;
    const int part = threadIdx.x / PAIRS, pair = blockIdx.x * PAIRS + threadIdx.x % PAIRS;
    const bool live = part < PARTS && pair < N / 2;
    float2 loaded[LOADS], total = make_float2(0.0f, 0.0f);
    receive(
        loaded, epoch, [&](int i) { return partials + (u64)(part + i * PARTS) * N + 2 * pair; },
        [&](int i) { return live && part + i * PARTS < SPLITS; });
#pragma unroll
    for (int i = 0; i < LOADS; i++) total.x += loaded[i].x, total.y += loaded[i].y;
    s.parts[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x >= PAIRS || pair >= N / 2) return;
    total = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int i = 0; i < PARTS; i++) {
        const float2 other = s.parts[i * PAIRS + threadIdx.x];
        total.x += other.x, total.y += other.y;
    }
    finish(2 * pair, total);
}

__device__ __forceinline__ float bias_of(const Matrix& m, int column) {
    return m.bias ? float_of(m.bias[column]) : 0.0f;
}
