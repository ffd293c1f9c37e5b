// What a block keeps in shared memory, and the steps that all its threads take together: sums and lists.
#pragma once

struct Layer {
    Matrix qkv, o, gate_up, down;
    const u16 *attention_norm, *ffn_norm, *q_norm, *k_norm;
    i64 window;
};

struct Limits {  // thresholds of a layer, rounded to the model's dtype
    float qkv[3], o, gate_up[2], down;
};

constexpr int X_PAIRS = ceil_div(HIDDEN / 2, THREADS);  // of the residual stream that a thread adds to
constexpr int HEAD_GROUPS = ceil_div(HEADS / KV_HEADS, GROUP_HEADS);
constexpr int ROW = HEAD_DIM + 32;  // of a head in 16 bits: rows two apart are off the same banks

// Channels that a block may list of each product, in multiples of four, and groups that its columns touch: rows of
// words. SCALED: the panels below have room. A list of floats, or without SCALED, has one row of words of x itself.
constexpr int fours(int x) { return ceil_div(x, 4) * 4; }
template <class W>
constexpr int groups_of(int granules) {  // which begin at a multiple of their number
    constexpr int OF_GROUP = W::GRANULES_OF_GROUP;
    if (W::BITS == 16 || !SCALED) return 1;
    if (granules % OF_GROUP == 0) return granules / OF_GROUP;
    return OF_GROUP % granules == 0 ? 1 : (granules + OF_GROUP - 2) / OF_GROUP + 1;
}
constexpr int QKV_CHANNELS = fours(ceil_div(HIDDEN / 2, QKV_SPLITS) * 2), QKV_GROUPS = groups_of<Qkv>(QKV_PIECE);
constexpr int O_CHANNELS = fours(ceil_div(HEADS * HEAD_DIM / 2, O_SPLITS) * 2), O_GROUPS = groups_of<O>(O_PIECE);
constexpr int MLP_CHANNELS = ceil_div(HIDDEN, 8 * MLP_SHARE) * 8, MLP_PAIRS = ceil_div(MLP_CHANNELS / 2, THREADS);
constexpr int H_PAIRS = ceil_div(TEAM_GRANULES * GateUp::COLUMNS / 2, MLP_SHARE);  // of a block's own columns
constexpr int MLP_GROUPS = groups_of<GateUp>(TEAM_GRANULES);  // of gate; of up as many
constexpr int X_CHANNELS = fours(HIDDEN);
constexpr int H_CHANNELS = fours(2 * H_PAIRS) + 4;  // off the same banks
constexpr int DOWN_GROUPS = groups_of<Down>(Down::GRANULES);
constexpr int LIST = max_of(max_of(X_CHANNELS, QKV_CHANNELS), max_of(O_CHANNELS, H_CHANNELS));
constexpr int PANEL_WORDS = max_of(QKV_GROUPS * QKV_CHANNELS, max_of(O_GROUPS * O_CHANNELS, DOWN_GROUPS * H_CHANNELS));
constexpr int SMALL_LIST = max_of(QKV_CHANNELS, max_of(O_CHANNELS, H_CHANNELS));
constexpr bool FETCHES_META = HEAD_BITS < 16 || (!SCALED && GateUp::BITS < 16);  // row by row, through the ring

struct Shared {
    union {
        Ring ring;
        float slots[THREADS * 16];  // sums of a product; Format::TEAMS * COLUMNS at most
        alignas(16) float attended[WARPS][GROUP_HEADS][HEAD_DIM];
    };
    union {
        u32 ring_words[FETCHES_META ? STAGES : 1][4][FETCHES_META ? THREADS : 1];
        struct {  // scales and zeros: of all channels, where the list's words replace them; of a small product's
            alignas(16) u32 mlp_panel[SCALED ? 2 * MLP_GROUPS : 1][SCALED ? MLP_CHANNELS : 4];
            u32 panel[SCALED ? PANEL_WORDS : 4];
        };
    };
    alignas(16) u32 list_words[max_of(PANEL_WORDS, max_of(X_CHANNELS, SCALED ? 0 : 2 * MLP_CHANNELS))];
    float list_values[SMALL_LIST];  // of a small product, until they are words; and where in the panel their scales are
    u16 list_places[SMALL_LIST];
    alignas(16) float x[HIDDEN];  // the residual stream
    alignas(16) u16 list_rows[LIST];
    alignas(16) float2 parts[THREADS];
    Layer layers[2];  // this one and the next: a pointer that has to be fetched first delays what it points to
    Limits limits[LAYERS];
    alignas(16) float heads[(GROUP_HEADS + 1) * HEAD_DIM];  // query heads and key of an attention unit
    alignas(16) u16 rows[GROUP_HEADS + 2][ROW];             // the same, rotated, and the value
    float cosines[HEAD_DIM / 2], sines[HEAD_DIM / 2];
    float largest[WARPS][GROUP_HEADS], weight[WARPS][GROUP_HEADS];
    alignas(16) int warp_counts[WARPS];
    alignas(16) u32 warp_largest[WARPS];
    alignas(16) float warp_sums[WARPS];
    int warp_tokens[WARPS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "plan.py and shared.cuh disagree about shared memory");

__device__ __forceinline__ float limit_of(const Matrix& m, int segment) {
    return rounded(m.thresholds[m.segments == 1 ? 0 : segment]);
}

constexpr int LAYER_WORDS = sizeof(Layer) / 8;
static_assert(LAYER_WORDS <= THREADS, "a thread carries a word of the next layer's table");

__device__ __forceinline__ void load_limits(const Layer* layers, Shared& s) {
    for (int i = threadIdx.x; i < LAYERS; i += THREADS) {
        const Layer& l = layers[i];
        s.limits[i] = {{limit_of(l.qkv, 0), limit_of(l.qkv, 1), limit_of(l.qkv, 2)}, limit_of(l.o, 0),
                       {limit_of(l.gate_up, 0), limit_of(l.gate_up, 1)}, limit_of(l.down, 0)};
    }
}

// The sum over all threads. Two calls need a __syncthreads between them.
__device__ __forceinline__ float sum_of_block(float x, Shared& s) {
    x = sum_of_warp(x);
    if (lane_of_warp() == 0) s.warp_sums[warp_of_block()] = x;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += s.warp_sums[i];
    return total;
}

// Ask for the scales and zeros of channel(0) ... channel(CHANNELS - 1) in a piece's groups, panel [GROUPS][CHANNELS],
// while memory has nothing else to do. The list before, which read the panel, is behind a __syncthreads.
template <class W, int GROUPS, int CHANNELS, class Channel>
__device__ __forceinline__ void fetch_panel(const Matrix& m, int first_group, Channel channel, Shared& s) {
    if (!SCALED || W::BITS == 16) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < CHANNELS * GROUPS; i += THREADS) {  // neighbouring lanes read neighbouring words
        const int row = channel(i / GROUPS), group = i % GROUPS;
        const bool wanted = row < W::K && first_group + group < W::GROUPS;
        const u32* const from = m.meta + (wanted ? row * W::GROUPS + first_group + group : 0);
        fetch_word(&s.panel[group * CHANNELS + i / GROUPS], from, wanted);
    }
    close_fetches();
}

struct Listed {
    int count;
    float enlarged;  // by which power of two the list's values were multiplied
};

// Where this thread's values go in a list: those whose bit in keep is set, in the order of threads. ENLARGED: values
// will be multiplied by a power of two that makes the largest 1 to 2. Whatever was fetched before is there afterwards.
template <bool ENLARGED, int COUNT>
__device__ __forceinline__ Listed enumerate(int& at, const float (&values)[COUNT], u32 keep, Shared& s) {
    const int mine = __popc(keep), lane = lane_of_warp(), warp = warp_of_block();
    int inclusive = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
        const int below = __shfl_up_sync(ALL_LANES, inclusive, distance);
        if (lane >= distance) inclusive += below;
    }
    u32 largest = 0;
    if (ENLARGED) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const u32 size = __float_as_uint(fabsf(values[i]));
            if ((keep >> i & 1) && size > largest) largest = size;
        }
        largest = __reduce_max_sync(ALL_LANES, largest);
    }
    if (lane == 31) s.warp_counts[warp] = inclusive, s.warp_largest[warp] = largest;
    await_fetches<0>();
    __syncthreads();
    int total = 0;
    at = inclusive - mine;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        const int count = s.warp_counts[i];
        at += i < warp ? count : 0;
        total += count;
        if (ENLARGED && s.warp_largest[i] > largest) largest = s.warp_largest[i];
    }
    const u32 exponent = largest >> 23 < 1 ? 127 : largest >> 23 > 253 ? 253 : largest >> 23;
    return {total, ENLARGED ? __uint_as_float(254 - exponent << 23) : 1.0f};
}

// The list of a small product: row(i) of each value kept, and its words of all groups, [GROUPS][CHANNELS], whose scales
// are at place(i) in the panel. First the values, then the words by all threads.
template <class W, int GROUPS, int CHANNELS, int COUNT, class Row, class Place>
__device__ __forceinline__ Listed compact(const float (&values)[COUNT], u32 keep, Row row, Place place, Shared& s) {
    constexpr bool HAS_SCALES = SCALED && W::BITS < 16;
    int at;
    const Listed listed = enumerate<W::BITS == 4>(at, values, keep, s);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (!(keep >> i & 1)) continue;
        const float value = values[i] * listed.enlarged;
        s.list_rows[at] = (u16)row(i);
        if (HAS_SCALES)
            s.list_values[at] = value, s.list_places[at] = (u16)place(i);
        else
            s.list_words[at] = __float_as_uint(value);
        at++;
    }
    const int count = listed.count, end = fours(count);  // the last four are read together
    if (const int rest = count + threadIdx.x; rest < end) {
        s.list_rows[rest] = 0;
        if (!HAS_SCALES) s.list_words[rest] = 0;
    }
    __syncthreads();
    if (!HAS_SCALES) return listed;
#pragma unroll 2
    for (int i = threadIdx.x; i < GROUPS * CHANNELS; i += THREADS) {
        const int entry = i % CHANNELS, group = i / CHANNELS;
        if (entry >= end) continue;
        const u32 word = entry < count
            ? W::word(s.list_values[entry], s.panel[group * CHANNELS + s.list_places[entry]]) : 0;
        s.list_words[i] = word;
    }
    __syncthreads();
    return listed;
}
