// gate, up and down without an exchange between them.
//
//     block b     columns b U .. (b + 1) U granules of gate, and the same of up, for all input channels
//                 h = silu(gate) * up of these columns
//                 the rows of down that these h meet, all columns: partial sums of the whole output
//
// Every block walks the same list of kept channels, so gate's and up's load is even, and neighbouring pieces of a row
// are read at about the same time. down's is not: blocks keep different shares of their h.
#pragma once

constexpr int H_PAIRS = MLP_GRANULES * GateUp::COLUMNS / 2;  // of a block's h
static_assert(H_PAIRS <= THREADS, "a block has more columns of the hidden layer than threads");

// Ask for the scales and zeros of all channels in this block's groups, while memory has nothing else to do.
__device__ __forceinline__ void fetch_panel(const Matrix& m, Shared& s) {
    constexpr int ALL = GateUp::GROUPS / 2, CHUNKS = HIDDEN / 4;
    for (int i = threadIdx.x; i < 2 * MLP_GROUPS * CHUNKS; i += THREADS) {
        const int group = i / CHUNKS, first = blockIdx.x * MLP_GRANULES / GateUp::GRANULES_OF_GROUP;
        const int in_half = first + group % max_of(MLP_GROUPS, 1);
        const bool wanted = in_half < ALL;
        const u32* const from = m.meta + (u64)(in_half + (group < MLP_GROUPS ? 0 : ALL)) * HIDDEN;
        fetch_row((uint4*)s.panel[group] + i % CHUNKS, (const u8*)(from + i % CHUNKS * 4), wanted, evict_first());
    }
    close_fetches();
}

// Sums of gate and up over the list into s.slots; returns what they have to be multiplied with.
__device__ __forceinline__ float gate_and_up(const Matrix& m, const Limits& limits, Listed listed, Shared& s) {
    constexpr int PIECE = 2 * MLP_GRANULES, HALF = GateUp::GRANULES / 2;
    Place<GateUp, PIECE> place;
    const bool is_up = place.granule >= MLP_GRANULES;
    const int column = blockIdx.x * MLP_GRANULES + place.granule % MLP_GRANULES, granule = column + (is_up ? HALF : 0);
    place.active &= column < HALF;
    const int first_group = blockIdx.x * MLP_GRANULES / GateUp::GRANULES_OF_GROUP;
    const int group = column / GateUp::GRANULES_OF_GROUP - first_group + (is_up ? MLP_GROUPS : 0);
    Sums<GateUp::BITS> sums;
    const u8* const weights = m.values + granule * 16;
    const List list{s.list_values, s.list_rows};
    const float limit = limits.gate_up[is_up] * listed.enlarged;
    if constexpr (PANEL) {
        gather<GateUp, PIECE, true>(sums, weights, Panel<GateUp>{s.panel[group]}, place, limit, listed.count, list,
                                    s.ring);
    } else {
        const RowByRow<GateUp, 1> meta(m.meta + (u64)(granule / GateUp::GRANULES_OF_GROUP) * HIDDEN, s.words);
        gather<GateUp, PIECE, true>(sums, weights, meta, place, limit, listed.count, list, s.ring);
    }
    __syncthreads();
    lay_out<GateUp, PIECE>(sums, place, s.slots);
    __syncthreads();
    return (float)m.unscale / listed.enlarged;
}

// List this block's h where it reaches down's threshold.
__device__ __forceinline__ Listed list_hidden(float unscale, float threshold, Shared& s) {
    constexpr int PIECE = 2 * MLP_GRANULES;
    float h[2] = {0.0f, 0.0f};
    const int pair = threadIdx.x, at = blockIdx.x * MLP_GRANULES + 2 * pair / GateUp::COLUMNS;
    const bool live = pair < H_PAIRS && at < GateUp::GRANULES / 2;
    if (live) {
        const float2 gate = sum_of_slots<GateUp, PIECE>(s.slots, pair, unscale);
        const float2 up = sum_of_slots<GateUp, PIECE>(s.slots, pair + H_PAIRS, unscale);
        const float a = rounded(gate.x), b = rounded(gate.y);
        h[0] = rounded(a / (1.0f + __expf(-a)) * rounded(up.x));
        h[1] = rounded(b / (1.0f + __expf(-b)) * rounded(up.y));
    }
    const int column = GateUp::column(at, 2 * pair % GateUp::COLUMNS);
    const u32 keep = live ? (is_kept(h[0], threshold) ? 1u : 0u) | (is_kept(h[1], threshold) ? 2u : 0u) : 0u;
    return compact<Down::BITS == 4>(h, keep, [&](int i) { return column + i; }, s);
}

__device__ __forceinline__ void down(const Matrix& m, Listed listed, u64* partials, u32 epoch, Shared& s) {
    constexpr int PIECE = Down::GRANULES < Down::TEAMS ? Down::GRANULES : Down::TEAMS;
#pragma unroll 1
    for (int piece = 0; piece < ceil_div(Down::GRANULES, PIECE); piece++) {
        if (piece) __syncthreads();  // s.slots is still being read
        product<Down, PIECE>(m, piece, blockIdx.x, listed, partials, epoch, s, [] {});
    }
}
