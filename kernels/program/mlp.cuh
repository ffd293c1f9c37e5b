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

// Which of the MLP_BLOCKS a block is. Those that are none of them are spread over the grid, so that no part of the GPU
// has more than its share of the others: a GPC whose SMs all read is slower, up to 20% measured.
struct MlpBlock {
    const int index = blockIdx.x * MLP_BLOCKS / GRID;
    const bool active = (int)blockIdx.x == ceil_div(index * GRID, MLP_BLOCKS);
    __device__ int first_group() const { return index * MLP_GRANULES / GateUp::GRANULES_OF_GROUP; }
};

// Ask for the scales and zeros of all channels in this block's groups, while memory has nothing else to do.
__device__ __forceinline__ void fetch_mlp_panel(const Matrix& m, Shared& s) {
    const MlpBlock mlp;
    if (!SCALED || GateUp::BITS == 16 || !mlp.active) return;
    constexpr int ALL = GateUp::GROUPS / 2, CHUNKS = HIDDEN / 4;
    for (int i = threadIdx.x; i < 2 * MLP_GROUPS * CHUNKS; i += THREADS) {
        const int group = i / CHUNKS, in_half = mlp.first_group() + group % MLP_GROUPS;
        const bool wanted = in_half < ALL;
        const u32* const from = m.meta + (u64)(wanted ? in_half + (group < MLP_GROUPS ? 0 : ALL) : 0) * HIDDEN;
        fetch_row((uint4*)s.mlp_panel[group] + i % CHUNKS, (const u8*)(from + i % CHUNKS * 4), wanted, evict_first());
    }
    close_fetches();
}

// What this block's rows of down have of scales and zeros.
__device__ __forceinline__ void fetch_down_panel(const Matrix& m, Shared& s) {
    const MlpBlock mlp;
    if (!mlp.active) return;
    auto channel = [&](int i) {
        const int at = mlp.index * MLP_GRANULES + i / GateUp::COLUMNS;
        return GateUp::column(at, i % GateUp::COLUMNS);
    };
    fetch_panel<Down, DOWN_GROUPS, H_CHANNELS>(m, 0, channel, s);
}

__device__ __forceinline__ u32* mlp_words(Shared& s) { return SCALED ? s.mlp_panel[0] : s.mlp_words[0]; }

// List the inputs that gate or up keeps: words of gate's groups, then of up's, 0 where that one does not keep it. With
// a panel, words replace scales; so all are read first.
__device__ __forceinline__ Listed list_inputs(const float (&y)[2 * X_PAIRS], const Limits& limits, Shared& s) {
    constexpr bool HAS_SCALES = SCALED && GateUp::BITS < 16;
    constexpr int COUNT = 2 * X_PAIRS, GROUPS = 2 * MLP_GROUPS;
    const u32 keep = residual::kept(y, fminf(limits.gate_up[0], limits.gate_up[1]));
    int at;
    const Listed listed = enumerate<GateUp::BITS == 4>(at, y, keep, s);
    u32 metas[GROUPS][HAS_SCALES ? COUNT : 1];
    if constexpr (HAS_SCALES) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < COUNT; i += 2) {
                if (!residual::has(i / 2)) continue;
                const uint2 two = ((const uint2*)s.mlp_panel[group])[residual::pair(i / 2)];
                metas[group][i] = two.x, metas[group][i + 1] = two.y;
            }
        }
        __syncthreads();
    }
    u32* const words = mlp_words(s);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (!(keep >> i & 1)) continue;
        s.list_rows[at] = (u16)residual::channel(i);
        const float value = y[i] * listed.enlarged;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const u32 word = HAS_SCALES ? GateUp::word(value, metas[group][i * HAS_SCALES]) : __float_as_uint(value);
            words[group * X_CHANNELS + at] = is_kept(y[i], limits.gate_up[group >= MLP_GROUPS]) ? word : 0;
        }
        at++;
    }
    if (const int rest = listed.count + threadIdx.x; rest < fours(listed.count)) {
        s.list_rows[rest] = 0;
        for (int group = 0; group < GROUPS; group++) words[group * X_CHANNELS + rest] = 0;
    }
    __syncthreads();
    return listed;
}

// Sums of gate and up over the list into s.slots; returns what they have to be multiplied with.
__device__ __forceinline__ float gate_and_up(const Matrix& m, Listed listed, Shared& s) {
    constexpr int PIECE = 2 * MLP_GRANULES, HALF = GateUp::GRANULES / 2;
    const MlpBlock mlp;
    Place<GateUp, PIECE> place;
    const bool is_up = place.granule >= MLP_GRANULES;
    const int column = mlp.index * MLP_GRANULES + place.granule % MLP_GRANULES;
    const int granule = column + (is_up ? HALF : 0);
    place.active &= column < HALF;
    const bool has_scales = SCALED && GateUp::BITS < 16;
    const int in_panel = has_scales ? column / GateUp::GRANULES_OF_GROUP - mlp.first_group() : 0;
    Sums<GateUp::BITS> sums;
    const List list{s.list_rows, mlp_words(s) + (in_panel + (is_up ? MLP_GROUPS : 0)) * X_CHANNELS, listed.count};
    const u32* const meta = m.meta + (u64)(granule / GateUp::GRANULES_OF_GROUP) * HIDDEN;
    gather<GateUp, PIECE, true, SCALED, 1>(sums, m.values + granule * 16, meta, place, list, s.ring, s.ring_words[0][0]);
    __syncthreads();
    lay_out<GateUp, PIECE>(sums, place, s.slots);
    __syncthreads();
    return (float)m.unscale / listed.enlarged;
}

// List this block's h where it reaches down's threshold. Several lanes to a pair of columns add the slots.
__device__ __forceinline__ Listed list_hidden(float unscale, float threshold, Shared& s) {
    constexpr int PIECE = 2 * MLP_GRANULES, LANES_OF_PAIR = power_of_two(min_of(THREADS / H_PAIRS, 16));
    const int pair = threadIdx.x / LANES_OF_PAIR, part = threadIdx.x % LANES_OF_PAIR;
    const int at = MlpBlock().index * MLP_GRANULES + 2 * pair / GateUp::COLUMNS;
    const bool live = pair < H_PAIRS && at < GateUp::GRANULES / 2;
    float2 gate = make_float2(0.0f, 0.0f), up = gate;
    if (live) {
        gate = sum_of_slots<GateUp, PIECE>(s.slots, pair, unscale, part, LANES_OF_PAIR);
        up = sum_of_slots<GateUp, PIECE>(s.slots, pair + H_PAIRS, unscale, part, LANES_OF_PAIR);
    }
#pragma unroll
    for (int distance = LANES_OF_PAIR / 2; distance; distance >>= 1) {
        gate.x += __shfl_xor_sync(ALL_LANES, gate.x, distance), gate.y += __shfl_xor_sync(ALL_LANES, gate.y, distance);
        up.x += __shfl_xor_sync(ALL_LANES, up.x, distance), up.y += __shfl_xor_sync(ALL_LANES, up.y, distance);
    }
    const float a = rounded(gate.x), b = rounded(gate.y);
    const float h[2] = {rounded(a / (1.0f + __expf(-a)) * rounded(up.x)),
                        rounded(b / (1.0f + __expf(-b)) * rounded(up.y))};
    const int column = GateUp::column(at, 2 * pair % GateUp::COLUMNS);
    const u32 keep =
        live && part == 0 ? (is_kept(h[0], threshold) ? 1u : 0u) | (is_kept(h[1], threshold) ? 2u : 0u) : 0u;
    auto row = [&](int i) { return column + i; };
    auto place = [&](int i) { return 2 * pair + i; };
    return compact<Down, DOWN_GROUPS, H_CHANNELS>(h, keep, row, place, s);
}

__device__ __forceinline__ void down(const Matrix& m, Listed listed, u64* partials, u32 epoch, Shared& s) {
    constexpr int PIECE = Down::GRANULES < Down::TEAMS ? Down::GRANULES : Down::TEAMS;
#pragma unroll 1
    for (int piece = 0; piece < ceil_div(Down::GRANULES, PIECE); piece++) {
        if (piece) __syncthreads();  // s.slots is still being read
        product<Down, PIECE, H_CHANNELS>(m, piece, 0, MlpBlock().index, listed, partials, epoch, s, [] {});
    }
}
