// gate, up and down, with nothing between them but an exchange within a small team of blocks.
//
//     team t      an equal run of gate's granules, and the same of up's: S = MLP_SHARE blocks
//     rank r      of the channels, the r-th eight of every S eights: sums over these
//     block       adds the sums of its team for all of the team's columns, h = silu(gate) * up
//                 the rows of down that these h meet, the r-th run of columns: partial sums of split t
//
// A block alone (S = 1) would read narrow pieces of each row; what wide ones gain, plan.py says. gate's and up's load
// is even. down's is not: teams keep different shares of their h. A team's share is nearer to the mean than a block's
// would be, and down has as many splits as there are teams.
#pragma once

constexpr int HALF = GateUp::GRANULES / 2, MLP_BLOCKS = MLP_TEAMS * MLP_SHARE;
constexpr int MLP_PIECE = 2 * TEAM_GRANULES, COLUMN_PAIRS = GateUp::COLUMNS / 2;  // of a granule

// Which of the MLP_BLOCKS a block is. Those that are none of them are spread over the grid, so that no part of the GPU
// has more than its share of the others: a half of it whose SMs all read is slower, up to 20% measured.
struct MlpBlock {
    const int index = blockIdx.x * MLP_BLOCKS / GRID;
    const bool active = (int)blockIdx.x == ceil_div(index * GRID, MLP_BLOCKS);
    const int team = index / MLP_SHARE, rank = index % MLP_SHARE;
    const int first = team * TEAM_GRANULES, granules = min_of(TEAM_GRANULES, HALF - first);  // of the team
    const int pairs = granules * COLUMN_PAIRS;
    const int down_piece = rank * DOWN_PIECES;  // its first

    __device__ int first_group() const { return first / GateUp::GRANULES_OF_GROUP; }
    __device__ int channel(int i) const { return (i / 8 * MLP_SHARE + rank) * 8 + i % 8; }
    __device__ static int pair(int i) { return threadIdx.x + i * THREADS; }  // of its channels, that this thread lists
    __device__ bool has(int i) const { return 2 * pair(i) < MLP_CHANNELS && channel(2 * pair(i)) < HIDDEN; }
    // The first column of gate, so row of down, of the team's pair of columns.
    __device__ int column(int pair) const {
        return GateUp::column(first + pair / COLUMN_PAIRS, pair % COLUMN_PAIRS * 2);
    }
    __device__ int down_group() const { return down_piece * DOWN_PIECE / Down::GRANULES_OF_GROUP; }
};

// Ask for the scales and zeros of this block's channels in its team's groups, while memory has nothing else to do.
__device__ __forceinline__ void fetch_mlp_panel(const Matrix& m, Shared& s) {
    const MlpBlock mlp;
    if (!SCALED || GateUp::BITS == 16 || !mlp.active) return;
    constexpr int ALL = GateUp::GROUPS / 2, CHUNKS = MLP_CHANNELS / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * MLP_GROUPS * CHUNKS; i += THREADS) {
        const int group = i / CHUNKS, in_half = mlp.first_group() + group % MLP_GROUPS;
        const int channel = mlp.channel(i % CHUNKS * 4);
        const bool wanted = in_half < ALL && channel < HIDDEN;
        const u32* const from = m.meta + (u64)(in_half + (group < MLP_GROUPS ? 0 : ALL)) * HIDDEN + channel;
        uint4* const to = (uint4*)s.mlp_panel[group] + i % CHUNKS;
        fetch_row<false>(to, (const u8*)(wanted ? from : m.meta), wanted, evict_first());
    }
    close_fetches();
}

// What this block's rows of down have of scales and zeros.
__device__ __forceinline__ void fetch_down_panel(const Matrix& m, Shared& s) {
    const MlpBlock mlp;
    if (!mlp.active) return;
    auto channel = [&](int i) { return i / 2 < mlp.pairs ? mlp.column(i / 2) + i % 2 : Down::K; };
    fetch_panel<Down, DOWN_GROUPS, H_CHANNELS>(m, mlp.down_group(), channel, s);
}

// The norm's weights of the channels that this thread lists: asked for before what it is to norm is there.
__device__ __forceinline__ void load_mlp_weight(u32 (&w)[MLP_PAIRS], const u16* weight) {
    const MlpBlock mlp;
#pragma unroll
    for (int i = 0; i < MLP_PAIRS; i++) w[i] = mlp.has(i) ? *(const u32*)(weight + mlp.channel(2 * mlp.pair(i))) : 0;
}

// This thread's channels, normed, and the bits of those that reach the threshold.
__device__ __forceinline__ u32 norm_inputs(float (&y)[2 * MLP_PAIRS], const u32 (&weight)[MLP_PAIRS], float scale,
                                           float threshold, const Shared& s) {
    const MlpBlock mlp;
    u32 keep = 0;
#pragma unroll
    for (int i = 0; i < MLP_PAIRS; i++) {
        if (!mlp.has(i)) continue;
        const float2 x = *(const float2*)(s.x + mlp.channel(2 * mlp.pair(i)));
        y[2 * i] = residual::normed(x.x, scale, low_of(weight[i]));
        y[2 * i + 1] = residual::normed(x.y, scale, high_of(weight[i]));
        if (is_kept(y[2 * i], threshold)) keep |= 1u << 2 * i;
        if (is_kept(y[2 * i + 1], threshold)) keep |= 2u << 2 * i;
    }
    return keep;
}

// List the inputs that gate or up keeps.
__device__ __forceinline__ Listed list_inputs(const u32 (&weight)[MLP_PAIRS], float scale, const Limits& limits,
                                              Shared& s) {
    const MlpBlock mlp;
    float y[2 * MLP_PAIRS];
    const u32 keep = norm_inputs(y, weight, scale, fminf(limits.gate_up[0], limits.gate_up[1]), s);
    auto place = [&](int i) { return 2 * mlp.pair(i / 2) + i % 2; };
    auto row = [&](int i) { return mlp.channel(place(i)); };
    return compact<GateUp>(y, keep, row, place, s);
}

// Sums of gate and up over the list into s.slots; returns what they have to be multiplied with.
__device__ __forceinline__ float gate_and_up(const Matrix& m, Listed listed, const Limits& limits, Shared& s) {
    const MlpBlock mlp;
    auto part = [&](const Place<GateUp, MLP_PIECE>& place) -> Part {
        const bool is_up = place.granule >= TEAM_GRANULES;
        const int in_team = place.granule % TEAM_GRANULES, column = mlp.first + in_team;
        const int granule = column + (is_up ? HALF : 0), group = granule / GateUp::GRANULES_OF_GROUP;
        const int in_panel = column / GateUp::GRANULES_OF_GROUP - mlp.first_group() + (is_up ? MLP_GROUPS : 0);
        const u32* const meta = SCALED ? s.mlp_panel[in_panel] : m.meta + (u64)group * HIDDEN;
        return {m.values + granule * 16, meta, in_team < mlp.granules, limits.gate_up[is_up] * listed.enlarged};
    };
    Sums<GateUp::BITS> sums;
    gather<GateUp, MLP_PIECE, true, HAS_PANEL<GateUp>, 1>(sums, part, s.list(listed), s.ring, s.ring_words[0][0]);
    __syncthreads();
    lay_out<GateUp, MLP_PIECE>(sums, s.slots);
    __syncthreads();
    return (float)m.unscale / listed.enlarged;
}

// Sums that the blocks of a team send each other, and themselves: words [team][rank][gate, up][2 H_PAIRS].
__device__ __forceinline__ u64* team_words(u64* words, int team, int rank) {
    return words + (i64)(team * MLP_SHARE + rank) * 4 * H_PAIRS;
}

__device__ __forceinline__ void send_to_team(float unscale, u64* words, u32 epoch, const Shared& s) {
    const MlpBlock mlp;
    u64* const to = team_words(words, mlp.team, mlp.rank);
    for (int pair = threadIdx.x; pair < 2 * H_PAIRS; pair += THREADS) {
        if (pair % H_PAIRS >= mlp.pairs) continue;
        const float2 sum = sum_of_slots<GateUp, MLP_PIECE>(s.slots, pair, unscale);
        send(to + 2 * pair, sum.x, sum.y, epoch);
    }
}

// Lanes that add a pair of columns of h together: from the slots, or one for gate and one for up of what the team sent.
constexpr int SLOT_LANES = power_of_two(min_of(THREADS / H_PAIRS, 16));
constexpr int LANES_OF_H = MLP_SHARE > 1 ? 2 : SLOT_LANES, H_PASSES = ceil_div(H_PAIRS * LANES_OF_H, THREADS);

// Which of the team's pairs of columns a lane adds.
struct HiddenPart {
    const int part = threadIdx.x % LANES_OF_H;

    __device__ int pair(int pass) const { return (threadIdx.x + pass * THREADS) / LANES_OF_H; }
};

// gate and up of pairs of the team's columns, added by their lanes in an order of their own; right in the first lane.
__device__ __forceinline__ void add_parts(float2 (&gate)[H_PASSES], float2 (&up)[H_PASSES], float unscale,
                                          const u64* words, u32 epoch, const Shared& s) {
    const MlpBlock mlp;
    const HiddenPart h;
    if constexpr (MLP_SHARE > 1) {
        float2 sums[H_PASSES * MLP_SHARE];
        receive(
            sums, epoch,
            [&](int i) {
                const u64* const from = team_words((u64*)words, mlp.team, i % MLP_SHARE);
                return from + 2 * (h.part * H_PAIRS + h.pair(i / MLP_SHARE));
            },
            [&](int i) { return h.pair(i / MLP_SHARE) < mlp.pairs; });
#pragma unroll
        for (int i = 0; i < H_PASSES; i++) {
            gate[i] = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int j = i * MLP_SHARE; j < (i + 1) * MLP_SHARE; j++) gate[i].x += sums[j].x, gate[i].y += sums[j].y;
            up[i].x = __shfl_xor_sync(ALL_LANES, gate[i].x, 1), up[i].y = __shfl_xor_sync(ALL_LANES, gate[i].y, 1);
        }
    } else {
#pragma unroll
        for (int i = 0; i < H_PASSES; i++) {
            gate[i] = up[i] = make_float2(0.0f, 0.0f);
            if (h.pair(i) < mlp.pairs) {
                gate[i] = sum_of_slots<GateUp, MLP_PIECE>(s.slots, h.pair(i), unscale, h.part, LANES_OF_H);
                up[i] = sum_of_slots<GateUp, MLP_PIECE>(s.slots, h.pair(i) + H_PAIRS, unscale, h.part, LANES_OF_H);
            }
#pragma unroll
            for (int distance = LANES_OF_H / 2; distance; distance >>= 1) {
                gate[i].x += __shfl_xor_sync(ALL_LANES, gate[i].x, distance);
                gate[i].y += __shfl_xor_sync(ALL_LANES, gate[i].y, distance);
                up[i].x += __shfl_xor_sync(ALL_LANES, up[i].x, distance);
                up[i].y += __shfl_xor_sync(ALL_LANES, up[i].y, distance);
            }
        }
    }
}

// List the team's h where it reaches down's threshold.
__device__ __forceinline__ Listed list_hidden(float unscale, float threshold, const u64* words, u32 epoch, Shared& s) {
    const MlpBlock mlp;
    const HiddenPart part;
    float2 gate[H_PASSES], up[H_PASSES];
    add_parts(gate, up, unscale, words, epoch, s);
    float h[2 * H_PASSES];
    u32 keep = 0;
#pragma unroll
    for (int i = 0; i < H_PASSES; i++) {
        const float a = rounded(gate[i].x), b = rounded(gate[i].y);
        h[2 * i] = rounded(a / (1.0f + __expf(-a)) * rounded(up[i].x));
        h[2 * i + 1] = rounded(b / (1.0f + __expf(-b)) * rounded(up[i].y));
        if (part.part != 0 || part.pair(i) >= mlp.pairs) continue;
        if (is_kept(h[2 * i], threshold)) keep |= 1u << 2 * i;
        if (is_kept(h[2 * i + 1], threshold)) keep |= 2u << 2 * i;
    }
    auto row = [&](int i) { return mlp.column(part.pair(i / 2)) + i % 2; };
    auto place = [&](int i) { return 2 * part.pair(i / 2) + i % 2; };
    return compact<Down>(h, keep, row, place, s);
}

__device__ __forceinline__ void down(const Matrix& m, Listed listed, u64* partials, u32 epoch, Shared& s) {
    const MlpBlock mlp;
#pragma unroll 1
    for (int i = 0; i < DOWN_PIECES; i++) {
        if (i) __syncthreads();  // s.slots is still being read
        product<Down, DOWN_PIECE, H_CHANNELS>(m, mlp.down_piece + i, mlp.down_group(), mlp.team, listed, partials,
                                              epoch, s, [] {});
    }
}
