// How products are cut into the blocks' parts, and the scales that a block keeps of each: its panel.
//
//     groups along the output    [channels, then second rows][groups]    a word for each group that the columns touch
//                                of gate and up [groups][channels, then second rows]
//     along the input            [groups], each [granules][SCALE_ROW]    words of each column, for each group that the
//                                and GROUP_REST words                    channels touch; a part has neighbours, then
//
// SCALED: shared memory has room for panels. Without, words come row by row (gather.cuh), or are read at the end.
#pragma once

// Words of a granule, and how many more a group has. So four lanes of a granule, which read two groups each, and their
// neighbours are off the same banks.
constexpr int SCALE_ROW = 32 + 4, GROUP_REST = 4;
constexpr int fours(int x) { return ceil_div(x, 4) * 4; }

// Groups that so many granules touch, which begin at a multiple of their number; or so many channels.
constexpr int touched(int count, int of_group) {
    if (count % of_group == 0) return count / of_group;
    return of_group % count == 0 ? 1 : (count + of_group - 2) / of_group + 1;
}

// Channel number i of a part of CHANNELS, one of PARTS: those of every PARTS-th run of RUN. So parts are of even load.
template <class W, int RUN, int PARTS, int CHANNELS>
__device__ __forceinline__ int channel_of_part(int part, int i) {
    return W::BY_INPUT ? part * CHANNELS + i : (i / RUN * PARTS + part) * RUN + i % RUN;
}

// Of a split of o, whose channels the list of what attention sent and the panel share.
__device__ __forceinline__ int channel_of_o(int split, int i) {
    return channel_of_part<O, O_RUN, O_SPLITS, O_CHANNELS>(split, i);
}

template <class W_, int GRANULES_, int CHANNELS_, int SECONDS_>
struct Panel {
    using W = W_;
    static constexpr int GRANULES = GRANULES_, CHANNELS = CHANNELS_, SECONDS = SECONDS_, ROWS = CHANNELS + SECONDS;
    static constexpr bool EXISTS = SCALED && W::BITS < 16;
    static constexpr int GROUPS =
        W::BY_INPUT ? touched(CHANNELS, W::GROUP_CHANNELS) : touched(GRANULES, W::GRANULES_OF_GROUP);
    // Words from a channel to the next, or from a group to the next where they lie along the input.
    static constexpr int STRIDE = W::BY_INPUT ? (EXISTS ? GRANULES * SCALE_ROW + GROUP_REST : W::N)
                                              : (EXISTS ? GROUPS : W::GROUPS);
    static constexpr int WORDS = EXISTS ? (W::BY_INPUT ? GROUPS : ROWS) * STRIDE : 4;
    static constexpr bool HAS_PLACES = EXISTS && !W::BY_INPUT;  // whether a list says where in it a row's scales are

    // Of the groups along the input that a part's channels are of; 0 where groups lie along the output.
    static __device__ __forceinline__ int first_input_group(int part) {
        if constexpr (W::BY_INPUT) return part * CHANNELS / W::GROUP_CHANNELS;
        return 0;
    }
};

// How many channels a part has plan.py says, in multiples of four. Of down a block of a team has an equal run of the
// columns, in pieces that lanes can sum at once. A warp's granules have the same slot where groups lie along the input
// (formats.cuh).
constexpr int H_FOURS = TEAM_GRANULES * GateUp::COLUMNS / 4;  // of a team's columns of the hidden layer
constexpr int H_CHANNELS = 4 * H_FOURS, X_CHANNELS = fours(HIDDEN);
constexpr int DOWN_PIECES = ceil_div(ceil_div(Down::GRANULES, MLP_SHARE), Down::TEAMS);
constexpr int DOWN_UNIT = Down::BY_INPUT ? 8 : 1;
constexpr int DOWN_PIECE = ceil_div(Down::GRANULES, MLP_SHARE * DOWN_PIECES * DOWN_UNIT) * DOWN_UNIT;

using QkvPanel = Panel<Qkv, QKV_PIECE, QKV_CHANNELS, QKV_SECONDS>;
using OPanel = Panel<O, O_PIECE, O_CHANNELS, O_SECONDS>;
using GatePanel = Panel<GateUp, TEAM_GRANULES, MLP_CHANNELS, MLP_SECONDS>;  // up's, of the same size, is behind it
using DownPanel = Panel<Down, DOWN_PIECES * DOWN_PIECE, H_CHANNELS, DOWN_SECONDS>;

// Ask for the panel of a part, whose first granule is first_granule. channel(i) is its i-th. What read the panel before
// is behind a __syncthreads. Four bytes at a time, and with others waiting, this was 2.4 of 45 us of a layer (8B in
// int4 at 50%, H200).
template <class P, class Channel>
__device__ __forceinline__ void fetch_panel(const Matrix& m, int part, int first_granule, Channel channel, u32* panel) {
    using W = typename P::W;
    if (!P::EXISTS) return;
    const u64 policy = evict_first();
    if constexpr (W::BY_INPUT) {
        const int first_group = P::first_input_group(part);
#pragma unroll 1
        for (int i = threadIdx.x; i < P::GROUPS * P::GRANULES * 8; i += THREADS) {
            const int place = i / 8 % P::GRANULES, in_panel = i / 8 / P::GRANULES, word = i % 8 * 4;
            const int granule = first_granule + place, group = first_group + in_panel;
            const bool wanted = group * W::GROUP_CHANNELS < W::K && granule < W::GRANULES;
            const i64 from = wanted ? (i64)group * W::N + granule * W::COLUMNS + word : 0;
            u32* const to = panel + in_panel * P::STRIDE + place * SCALE_ROW + word;
            fetch_row<false>((uint4*)to, (const u8*)(m.meta + from), wanted, policy);
        }
    } else {
        const int first_group = first_granule / W::GRANULES_OF_GROUP;
        constexpr bool WHOLE = P::GRANULES % W::GRANULES_OF_GROUP == 0;  // else parts begin at any group
        constexpr int SIZE = WHOLE && P::GROUPS % 4 == 0 && W::GROUPS % 4 == 0 ? 4 : 1;  // words at once
#pragma unroll 1
        for (int i = threadIdx.x * SIZE; i < P::WORDS; i += THREADS * SIZE) {
            const bool is_second = P::SECONDS && i >= P::CHANNELS * P::GROUPS;
            const int place = i / P::GROUPS, group = first_group + i % P::GROUPS;
            const int row = is_second ? part * P::SECONDS + place - P::CHANNELS : channel(place);
            const bool wanted = (is_second || row < W::K) && group < W::GROUPS;
            const u32* const from = (is_second ? m.second_meta : m.meta) + (wanted ? row * W::GROUPS + group : 0);
            if (SIZE == 4)
                fetch_row<false>((uint4*)(panel + i), (const u8*)from, wanted, policy);
            else
                fetch_word(panel + i, from, wanted);
        }
    }
}

// Words of a granule in a panel that begins at first_granule; without a panel in m. Those of the first row, or of the
// granule's columns in the first group along the input.
template <class P>
__device__ __forceinline__ const u32* scales_by_output(const Matrix& m, const u32* panel, int first_granule,
                                                       int granule) {
    const int group = granule / P::W::GRANULES_OF_GROUP;
    return P::EXISTS ? panel + group - first_granule / P::W::GRANULES_OF_GROUP : m.meta + group;
}
template <class P>
__device__ __forceinline__ const u32* scales_by_input(const Matrix& m, const u32* panel, int first_group,
                                                      int first_granule, int granule) {
    using W = typename P::W;
    if (P::EXISTS) return panel + (granule - first_granule) * SCALE_ROW;
    return m.meta + (i64)first_group * W::N + min_of(granule, W::GRANULES - 1) * W::COLUMNS;
}
