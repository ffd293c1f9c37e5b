// gate, up and down, with nothing between them but an exchange within a small team of blocks.
//
//     team t      an equal run of gate's granules, and the same of up's: S = MLP_SHARE blocks
//     rank r      of the channels, the r-th eight of every S eights: sums over these
//     block       adds the sums of its team for its own pairs of columns, h = silu(gate) * up
//                 the rows of down that these h meet, all columns: partial sums of the whole output
//
// A block alone (S = 1) would read narrow pieces of each row; what wide ones gain, plan.py says. gate's and up's load
// is even. down's is not: blocks keep different shares of their h.
#pragma once

constexpr int HALF = GateUp::GRANULES / 2, MLP_BLOCKS = MLP_TEAMS * MLP_SHARE;
constexpr int MLP_PIECE = 2 * TEAM_GRANULES, COLUMN_PAIRS = GateUp::COLUMNS / 2;  // of a granule
static_assert(H_PAIRS * (MLP_SHARE > 1 ? 2 * MLP_SHARE : 1) <= THREADS, "a block has more columns than threads");

// Which of the MLP_BLOCKS a block is. Those that are none of them are spread over the grid, so that no part of the GPU
// has more than its share of the others: a half of it whose SMs all read is slower, up to 20% measured.
struct MlpBlock {
    const int index = blockIdx.x * MLP_BLOCKS / GRID;
    const bool active = (int)blockIdx.x == ceil_div(index * GRID, MLP_BLOCKS);
    const int team = index / MLP_SHARE, rank = index % MLP_SHARE;
    const int first = team * TEAM_GRANULES, granules = min_of(TEAM_GRANULES, HALF - first);  // of the team
    const int pairs = granules * COLUMN_PAIRS;
    const int own = rank * pairs / MLP_SHARE, owns = (rank + 1) * pairs / MLP_SHARE - own;  // of the team's pairs

    __device__ int first_group() const { return first / GateUp::GRANULES_OF_GROUP; }
    __device__ int channel(int i) const { return (i / 8 * MLP_SHARE + rank) * 8 + i % 8; }
    __device__ static int pair(int i) { return threadIdx.x + i * THREADS; }  // of its channels, that this thread lists
    __device__ bool has(int i) const { return 2 * pair(i) < MLP_CHANNELS && channel(2 * pair(i)) < HIDDEN; }
    // The first column of gate, so row of down, of this block's pair of columns.
    __device__ int column(int pair) const {
        const int of_team = own + pair;
        return GateUp::column(first + of_team / COLUMN_PAIRS, of_team % COLUMN_PAIRS * 2);
    }
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
    auto channel = [&](int i) { return i / 2 < mlp.owns ? mlp.column(i / 2) + i % 2 : Down::K; };
    fetch_panel<Down, DOWN_GROUPS, H_CHANNELS>(m, 0, channel, s);
}

__device__ __forceinline__ u32* mlp_words(Shared& s) { return SCALED ? s.mlp_panel[0] : s.list_words; }

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

// List the inputs that gate or up keeps: words of gate's groups, then of up's, 0 where that one does not keep it. With
// a panel, words replace scales; so all are read first.
__device__ __forceinline__ Listed list_inputs(const u32 (&weight)[MLP_PAIRS], float scale, const Limits& limits,
                                              Shared& s) {
    constexpr bool HAS_SCALES = SCALED && GateUp::BITS < 16;
    constexpr int COUNT = 2 * MLP_PAIRS, GROUPS = 2 * MLP_GROUPS;
    const MlpBlock mlp;
    float y[COUNT];
    const u32 keep = norm_inputs(y, weight, scale, fminf(limits.gate_up[0], limits.gate_up[1]), s);
    int at;
    const Listed listed = enumerate<GateUp::BITS == 4>(at, y, keep, s);
    u32 metas[GROUPS][HAS_SCALES ? COUNT : 1];
    if constexpr (HAS_SCALES) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < MLP_PAIRS; i++) {
                if (!mlp.has(i)) continue;
                const uint2 two = ((const uint2*)s.mlp_panel[group])[mlp.pair(i)];
                metas[group][2 * i] = two.x, metas[group][2 * i + 1] = two.y;
            }
        }
        __syncthreads();
    }
    u32* const words = mlp_words(s);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (!(keep >> i & 1)) continue;
        s.list_rows[at] = (u16)mlp.channel(2 * mlp.pair(i / 2) + i % 2);
        const float value = y[i] * listed.enlarged;
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const u32 word = HAS_SCALES ? GateUp::word(value, metas[group][i * HAS_SCALES]) : __float_as_uint(value);
            words[group * MLP_CHANNELS + at] = is_kept(y[i], limits.gate_up[group >= MLP_GROUPS]) ? word : 0;
        }
        at++;
    }
    if (const int rest = listed.count + threadIdx.x; rest < fours(listed.count)) {
        s.list_rows[rest] = 0;
        for (int group = 0; group < GROUPS; group++) words[group * MLP_CHANNELS + rest] = 0;
    }
    __syncthreads();
    return listed;
}

// Sums of gate and up over the list into s.slots; returns what they have to be multiplied with.
__device__ __forceinline__ float gate_and_up(const Matrix& m, Listed listed, Shared& s) {
    const MlpBlock mlp;
    Place<GateUp, MLP_PIECE> place;
    const bool is_up = place.granule >= TEAM_GRANULES;
    const int in_team = place.granule % TEAM_GRANULES, column = mlp.first + in_team;
    const int granule = column + (is_up ? HALF : 0);
    place.active &= in_team < mlp.granules;
    const bool has_scales = SCALED && GateUp::BITS < 16;
    const int in_panel = has_scales ? column / GateUp::GRANULES_OF_GROUP - mlp.first_group() : 0;
    Sums<GateUp::BITS> sums;
    const List list{s.list_rows, mlp_words(s) + (in_panel + (is_up ? MLP_GROUPS : 0)) * MLP_CHANNELS, listed.count};
    const u32* const meta = m.meta + (u64)(granule / GateUp::GRANULES_OF_GROUP) * HIDDEN;
    const u8* const weights = m.values + granule * 16;
    gather<GateUp, MLP_PIECE, true, SCALED, 1>(sums, weights, meta, place, list, s.ring, s.ring_words[0][0]);
    __syncthreads();
    lay_out<GateUp, MLP_PIECE>(sums, place, s.slots);
    __syncthreads();
    return (float)m.unscale / listed.enlarged;
}

// Sums that the blocks of a team owe each other, and themselves: words [block][rank of sender][gate, up][2 H_PAIRS].
__device__ __forceinline__ u64* team_words(u64* words, int block, int rank) {
    return words + (i64)(block * MLP_SHARE + rank) * 4 * H_PAIRS;
}

__device__ __forceinline__ void send_to_team(float unscale, u64* words, u32 epoch, const Shared& s) {
    const MlpBlock mlp;
    for (int pair = threadIdx.x; pair < MLP_PIECE * COLUMN_PAIRS; pair += THREADS) {
        const int half = pair / (TEAM_GRANULES * COLUMN_PAIRS), of_team = pair % (TEAM_GRANULES * COLUMN_PAIRS);
        if (of_team >= mlp.pairs) continue;
        const float2 sum = sum_of_slots<GateUp, MLP_PIECE>(s.slots, pair, unscale);
        const int owner = ((of_team + 1) * MLP_SHARE - 1) / mlp.pairs;
        const int own = of_team - owner * mlp.pairs / MLP_SHARE;
        u64* const to = team_words(words, mlp.team * MLP_SHARE + owner, mlp.rank);
        send(to + 2 * (half * H_PAIRS + own), sum.x, sum.y, epoch);
    }
}

// Lanes that add a pair of columns of h together: from the slots, or what the team has sent.
constexpr int SLOT_LANES = power_of_two(min_of(THREADS / H_PAIRS, 16));
constexpr int LANES_OF_H = MLP_SHARE > 1 ? 2 * MLP_SHARE : SLOT_LANES;

// gate and up of this block's pair of columns, added by its lanes in an order of their own; right in the first of them.
__device__ __forceinline__ void add_parts(float2& gate, float2& up, int pair, int part, bool live, float unscale,
                                          const u64* words, u32 epoch, const Shared& s) {
    const MlpBlock mlp;
    gate = up = make_float2(0.0f, 0.0f);
    if constexpr (MLP_SHARE > 1) {  // of which the first half of the lanes has gate's, the second up's
        float2 sum[1];
        const int rank = part % MLP_SHARE, half = part / MLP_SHARE;
        receive(
            sum, epoch, [&](int) { return team_words((u64*)words, mlp.index, rank) + 2 * (half * H_PAIRS + pair); },
            [&](int) { return live; });
#pragma unroll
        for (int distance = MLP_SHARE / 2; distance; distance >>= 1) {
            sum[0].x += __shfl_xor_sync(ALL_LANES, sum[0].x, distance);
            sum[0].y += __shfl_xor_sync(ALL_LANES, sum[0].y, distance);
        }
        gate = sum[0];
        up.x = __shfl_xor_sync(ALL_LANES, sum[0].x, MLP_SHARE), up.y = __shfl_xor_sync(ALL_LANES, sum[0].y, MLP_SHARE);
    } else {
        if (live) {
            gate = sum_of_slots<GateUp, MLP_PIECE>(s.slots, pair, unscale, part, LANES_OF_H);
            up = sum_of_slots<GateUp, MLP_PIECE>(s.slots, pair + H_PAIRS, unscale, part, LANES_OF_H);
        }
#pragma unroll
        for (int distance = LANES_OF_H / 2; distance; distance >>= 1) {
            gate.x += __shfl_xor_sync(ALL_LANES, gate.x, distance);
            gate.y += __shfl_xor_sync(ALL_LANES, gate.y, distance);
            up.x += __shfl_xor_sync(ALL_LANES, up.x, distance);
            up.y += __shfl_xor_sync(ALL_LANES, up.y, distance);
        }
    }
}

// List this block's h where it reaches down's threshold.
__device__ __forceinline__ Listed list_hidden(float unscale, float threshold, const u64* words, u32 epoch, Shared& s) {
    const MlpBlock mlp;
    const int pair = threadIdx.x / LANES_OF_H, part = threadIdx.x % LANES_OF_H;
    const bool live = pair < mlp.owns;
    float2 gate, up;
    add_parts(gate, up, pair, part, live, unscale, words, epoch, s);
    const float a = rounded(gate.x), b = rounded(gate.y);
    const float h[2] = {rounded(a / (1.0f + __expf(-a)) * rounded(up.x)),
                        rounded(b / (1.0f + __expf(-b)) * rounded(up.y))};
    const int column = mlp.column(live ? pair : 0);
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
