// gate, up and down, with nothing between them but an exchange within a small team of blocks.
//
//     team t      an equal run of gate's granules, and the same of up's: S = MLP_SHARE blocks
//     rank r      of the channels, the r-th run of every S runs: sums over these
//     block       adds the sums of its team for all of the team's columns, h = silu(gate) * up
//                 the rows of down that these h meet, the r-th run of columns: partial sums of split t
//
// A block alone (S = 1) would read narrow pieces of each row; what wide ones gain, plan.py says. gate's and up's load
// is even. down's is not: teams keep different shares of their h. A team's share is nearer to the mean than a block's
// would be, and down has as many splits as there are teams.
#pragma once

constexpr int HALF = GateUp::GRANULES / 2, MLP_BLOCKS = MLP_TEAMS * MLP_SHARE;
constexpr int MLP_PIECE = 2 * TEAM_GRANULES, COLUMN_FOURS = GateUp::COLUMNS / 4;  // of a granule

// Which of the MLP_BLOCKS a block is. Those that are none of them are spread over the grid. So no part of the GPU has
// more than its share of the others. A half whose SMs all read is slower, up to 20% measured.
struct MlpBlock {
    const int index = blockIdx.x * MLP_BLOCKS / GRID;
    const bool active = (int)blockIdx.x == ceil_div(index * GRID, MLP_BLOCKS);
    const int team = index / MLP_SHARE, rank = index % MLP_SHARE;
    const int first = team * TEAM_GRANULES, granules = min_of(TEAM_GRANULES, HALF - first);  // of the team
    const int fours = granules * COLUMN_FOURS;
    const int down_piece = rank * DOWN_PIECES, down_granule = down_piece * DOWN_PIECE;  // its first

    __device__ int first_group() const { return first / GateUp::GRANULES_OF_GROUP; }
    __device__ int channel(int i) const { return channel_of_part<GateUp, MLP_RUN, MLP_SHARE, MLP_CHANNELS>(rank, i); }
    // Fours of its channels, that this thread lists.
    __device__ static int own(int i) { return threadIdx.x + i * THREADS; }
    __device__ bool has(int i) const { return 4 * own(i) < MLP_CHANNELS && channel(4 * own(i)) < HIDDEN; }
    // The first column of gate, so row of down, of the team's four columns.
    __device__ int column(int four) const {
        return GateUp::column(first + four / COLUMN_FOURS, four % COLUMN_FOURS * 4);
    }
};

// As fetch_panel, of this block's channels in its team's groups.
__device__ __forceinline__ void fetch_mlp_panel(const Matrix& m, Shared& s) {
    const MlpBlock mlp;
    if (!GatePanel::EXISTS || !mlp.active) return;
    if constexpr (GateUp::BY_INPUT) {
        auto channel = [&](int i) { return mlp.channel(i); };
        fetch_panel<GatePanel>(m, mlp.rank, mlp.first, channel, s.mlp_panel);
        return fetch_panel<GatePanel>(m, mlp.rank, HALF + mlp.first, channel, s.mlp_panel + GatePanel::WORDS);
    }
    constexpr int ALL = GateUp::GROUPS / 2, CHUNKS = GatePanel::ROWS / 4, GROUPS = GatePanel::GROUPS;
    const u64 policy = evict_first();
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * GROUPS * CHUNKS; i += THREADS) {
        const int group = i / CHUNKS, in_half = mlp.first_group() + group % GROUPS, row = i % CHUNKS * 4;
        const int of_all = in_half + (group < GROUPS ? 0 : ALL), channel = mlp.channel(row);
        const bool is_second = MLP_SECONDS && row >= MLP_CHANNELS;
        const bool wanted = in_half < ALL && (is_second || channel < HIDDEN);
        const i64 second = (i64)(mlp.rank * GateUp::GROUPS + of_all) * MLP_SECONDS + row - MLP_CHANNELS;
        const u32* const from = is_second ? m.second_meta + second : m.meta + (i64)of_all * GATE_UP_ROWS + channel;
        uint4* const to = (uint4*)s.mlp_panel + i;
        fetch_row<false>(to, (const u8*)(wanted ? from : m.meta), wanted, policy);
    }
}

// Of this block's rows of down.
__device__ __forceinline__ void fetch_down_panel(const Matrix& m, Shared& s) {
    const MlpBlock mlp;
    if (!mlp.active) return;
    auto channel = [&](int i) { return i / 4 < mlp.fours ? mlp.column(i / 4) + i % 4 : Down::K; };
    fetch_panel<DownPanel>(m, mlp.team, mlp.down_granule, channel, s.down_panel);
}

// A thread's inputs of gate and up.
struct MlpInputs {
    static constexpr int COUNT = ceil_div(MLP_CHANNELS / 4, THREADS);
    residual::Part<COUNT> part;
    Seconds<MLP_SECONDS, 4 * COUNT> seconds;
    const MlpBlock mlp;

    __device__ int four(int i) const { return mlp.channel(4 * mlp.own(i)) / 4; }

    // What is known before x.
    __device__ __forceinline__ void load(const u16* norm, const Matrix& m) {
        auto has = [&](int i) { return mlp.has(i); };
        part.load_weight(norm, [&](int i) { return four(i); }, has);
        seconds.load(m, [&](int i) { return 4 * four(i); }, has);
    }

    // List those that gate or up keeps.
    __device__ __forceinline__ Listed list(const uint4* x, const Limits& limits, u32 epoch, Shared& s) const {
        float y[4 * COUNT];
        auto has = [&](int i) { return mlp.has(i); };
        part.receive_normed(y, x, [&](int i) { return four(i); }, has, epoch, s);
        const u32 keep = kept(y, has, fminf(limits.gate_up[0], limits.gate_up[1]));
        auto place = [&](int i) { return 4 * mlp.own(i / 4) + i % 4; };
        return list_rows<GatePanel>(y, keep, [&](int i) { return mlp.channel(place(i)); }, place, seconds, s);
    }
};

// Sums of gate and up over the list into s.slots; returns what they have to be multiplied with.
__device__ __forceinline__ float gate_and_up(const Matrix& m, Listed listed, const Limits& limits, Shared& s) {
    const MlpBlock mlp;
    const int first_group = GatePanel::first_input_group(mlp.rank);
    auto part = [&](const Place<GateUp, MLP_PIECE>& place) -> Part {
        const bool is_up = place.granule >= TEAM_GRANULES;
        const int in_team = place.granule % TEAM_GRANULES, column = mlp.first + in_team;
        const int granule = column + (is_up ? HALF : 0), group = granule / GateUp::GRANULES_OF_GROUP;
        const u32* words = s.mlp_panel + (is_up ? GatePanel::WORDS : 0);
        if (GateUp::BY_INPUT)
            words = scales_by_input<GatePanel>(m, words, first_group, mlp.first + (is_up ? HALF : 0), granule);
        else if (GatePanel::EXISTS)
            words += (column / GateUp::GRANULES_OF_GROUP - mlp.first_group()) * GatePanel::ROWS;
        else
            words = m.meta + (u64)group * GATE_UP_ROWS;
        return {m.values + granule * 16, words, in_team < mlp.granules, limits.gate_up[is_up] * listed.enlarged};
    };
    SumsOf<GateUp> sums;
    gather<GateUp, MLP_PIECE, true, GatePanel::HAS_PLACES, 1>(sums, part, s.list(listed, first_group), s.ring,
                                                              s.ring_words[0][0], [] {});
    __syncthreads();
    lay_out_sums<GatePanel, MLP_PIECE>(sums, part, first_group, s.slots);
    __syncthreads();
    return (float)m.unscale / listed.enlarged;
}

// Sums that the blocks of a team send each other, and themselves: fours [team][rank][gate, up][H_FOURS].
__device__ __forceinline__ uint4* team_fours(uint4* fours, int team, int rank) {
    return fours + (i64)(team * MLP_SHARE + rank) * 2 * H_FOURS;
}

__device__ __forceinline__ void send_to_team(float unscale, uint4* fours, u32 epoch, const Shared& s) {
    const MlpBlock mlp;
    uint4* const to = team_fours(fours, mlp.team, mlp.rank);
    for (int four = threadIdx.x; four < 2 * H_FOURS; four += THREADS)
        if (four % H_FOURS < mlp.fours)
            send(to + four, sum_of_slots<GateUp, MLP_PIECE>(s.slots, four, unscale), epoch);
}

// Lanes that add four columns of h together: from the slots, or one for gate and one for up of what the team sent.
constexpr int SLOT_LANES = power_of_two(min_of(THREADS / H_FOURS, 16));
constexpr int LANES_OF_H = MLP_SHARE > 1 ? 2 : SLOT_LANES, H_PASSES = ceil_div(H_FOURS * LANES_OF_H, THREADS);

// Which of the team's fours a lane adds.
struct HiddenPart {
    const int part = threadIdx.x % LANES_OF_H;

    __device__ int four(int pass) const { return (threadIdx.x + pass * THREADS) / LANES_OF_H; }
    __device__ bool has(int pass) const { return part == 0 && four(pass) < MlpBlock().fours; }
};

using HiddenSeconds = Seconds<DOWN_SECONDS, 4 * H_PASSES>;
__device__ __forceinline__ void load_seconds(HiddenSeconds& seconds, const Matrix& m) {
    const HiddenPart h;
    seconds.load(m, [&](int i) { return MlpBlock().column(h.four(i)); }, [&](int i) { return h.has(i); });
}

// gate and up of the team's columns, added by their lanes in an order of their own; right in the first lane.
__device__ __forceinline__ void add_parts(float4 (&gate)[H_PASSES], float4 (&up)[H_PASSES], float unscale,
                                          uint4* fours, u32 epoch, const Shared& s) {
    const MlpBlock mlp;
    const HiddenPart h;
    if constexpr (MLP_SHARE > 1) {
        float4 sums[H_PASSES * MLP_SHARE];
        receive(
            sums, epoch,
            [&](int i) {
                return team_fours(fours, mlp.team, i % MLP_SHARE) + h.part * H_FOURS + h.four(i / MLP_SHARE);
            },
            [&](int i) { return h.four(i / MLP_SHARE) < mlp.fours; });
#pragma unroll
        for (int i = 0; i < H_PASSES; i++) {
            gate[i] = sums[i * MLP_SHARE];
#pragma unroll
            for (int j = i * MLP_SHARE + 1; j < (i + 1) * MLP_SHARE; j++) add_to(gate[i], sums[j]);
            up[i] = from_lane_xor(gate[i], 1);
        }
    } else {
#pragma unroll
        for (int i = 0; i < H_PASSES; i++) {
            gate[i] = up[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (h.four(i) < mlp.fours) {
                gate[i] = sum_of_slots<GateUp, MLP_PIECE>(s.slots, h.four(i), unscale, h.part, LANES_OF_H);
                up[i] = sum_of_slots<GateUp, MLP_PIECE>(s.slots, h.four(i) + H_FOURS, unscale, h.part, LANES_OF_H);
            }
#pragma unroll
            for (int distance = LANES_OF_H / 2; distance; distance >>= 1) {
                add_to(gate[i], from_lane_xor(gate[i], distance));
                add_to(up[i], from_lane_xor(up[i], distance));
            }
        }
    }
}

__device__ __forceinline__ float silu_times(float gate, float up) {
    const float x = rounded(gate);
    return rounded(__fdividef(x, 1.0f + __expf(-x)) * rounded(up));
}

// List the team's h where it reaches down's threshold.
__device__ __forceinline__ Listed list_hidden(float unscale, float threshold, const HiddenSeconds& seconds,
                                              uint4* fours, u32 epoch, Shared& s) {
    const MlpBlock mlp;
    const HiddenPart part;
    float4 gate[H_PASSES], up[H_PASSES];
    add_parts(gate, up, unscale, fours, epoch, s);
    float h[4 * H_PASSES];
#pragma unroll
    for (int i = 0; i < H_PASSES; i++) {
        h[4 * i] = silu_times(gate[i].x, up[i].x), h[4 * i + 1] = silu_times(gate[i].y, up[i].y);
        h[4 * i + 2] = silu_times(gate[i].z, up[i].z), h[4 * i + 3] = silu_times(gate[i].w, up[i].w);
    }
    auto has = [&](int i) { return part.has(i); };
    auto row = [&](int i) { return mlp.column(part.four(i / 4)) + i % 4; };
    auto place = [&](int i) { return 4 * part.four(i / 4) + i % 4; };
    return list_rows<DownPanel>(h, kept(h, has, threshold), row, place, seconds, s);
}

template <class Meanwhile>
__device__ __forceinline__ void down(const Matrix& m, Listed listed, uint4* partials, u32 epoch, Shared& s,
                                     Meanwhile meanwhile) {
    const MlpBlock mlp;
#pragma unroll 1
    for (int i = 0; i < DOWN_PIECES; i++) {
        if (i) __syncthreads();  // s.slots is still being read
        auto once = [&] {
            if (i == 0) meanwhile();
        };
        product<DownPanel, DOWN_PIECE>(m, mlp.down_piece + i, s.down_panel, mlp.down_granule, mlp.team, listed,
                                       partials, epoch, s, once, [] {});
    }
}
