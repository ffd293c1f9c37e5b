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

constexpr int X_PAIRS = ceil_div(HIDDEN / 2, THREADS);  // of the residual stream that a thread holds
constexpr int HEAD_GROUPS = ceil_div(HEADS / KV_HEADS, GROUP_HEADS);

// Channels that a block may list of each product, in multiples of four, and groups that its columns touch: rows of
// words. SCALED: the panels below have room. A list of floats, or without SCALED, has one row of words of x itself.
constexpr int fours(int x) { return ceil_div(x, 4) * 4; }
template <class W>
constexpr int groups_of(int granules) {
    constexpr int OF_GROUP = W::GRANULES_OF_GROUP;
    if (W::BITS == 16 || !SCALED) return 1;
    if (granules % OF_GROUP == 0) return granules / OF_GROUP;
    return OF_GROUP % granules == 0 ? 1 : (granules + OF_GROUP - 2) / OF_GROUP + 1;
}
constexpr int QKV_CHANNELS = fours(ceil_div(HIDDEN / 2, QKV_SPLITS) * 2), QKV_GROUPS = groups_of<Qkv>(QKV_PIECE);
constexpr int O_CHANNELS = fours(ceil_div(HEADS * HEAD_DIM / 2, O_SPLITS) * 2), O_GROUPS = groups_of<O>(O_PIECE);
constexpr int X_CHANNELS = fours(HIDDEN), MLP_GROUPS = groups_of<GateUp>(MLP_GRANULES);  // of gate; of up as many
constexpr int H_CHANNELS = fours(MLP_GRANULES * GateUp::COLUMNS), DOWN_GROUPS = groups_of<Down>(Down::GRANULES);
constexpr int LIST = max_of(max_of(X_CHANNELS, QKV_CHANNELS), max_of(O_CHANNELS, H_CHANNELS));
constexpr int PANEL_WORDS = max_of(QKV_GROUPS * QKV_CHANNELS, max_of(O_GROUPS * O_CHANNELS, DOWN_GROUPS * H_CHANNELS));
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
            alignas(16) u32 mlp_panel[SCALED ? 2 * MLP_GROUPS : 1][SCALED ? X_CHANNELS : 4];
            u32 panel[SCALED ? PANEL_WORDS : 4];
        };
    };
    alignas(16) u32 mlp_words[SCALED ? 1 : 2][SCALED ? 4 : X_CHANNELS];
    alignas(16) u32 list_words[max_of(PANEL_WORDS, X_CHANNELS)];
    alignas(16) u16 list_rows[LIST];
    alignas(16) float2 parts[THREADS];
    Layer layers[2];  // this one and the next: a pointer that has to be fetched first delays what it points to
    Limits limits[LAYERS];
    alignas(16) float heads[(GROUP_HEADS + 2) * HEAD_DIM];  // query heads, key and value of an attention unit
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

// Ask for the scales and zeros of channel(0) ... channel(CHANNELS - 1) in a piece's groups, [channel][group], while
// memory has nothing else to do. The list before, which read the panel, is behind a __syncthreads.
template <class W, int GROUPS, class Channel>
__device__ __forceinline__ void fetch_panel(const Matrix& m, int first_group, int channels, Channel channel, Shared& s) {
    if (!SCALED || W::BITS == 16) return;
    for (int i = threadIdx.x; i < channels * GROUPS; i += THREADS) {
        const int row = channel(i / GROUPS), group = first_group + i % GROUPS;
        const bool wanted = row < W::K && group < W::GROUPS;
        fetch_word(&s.panel[i], m.meta + (wanted ? row * W::GROUPS + group : 0), wanted);
    }
    close_fetches();
}

// The word of a value in a list of a small product: with its scale if there are panels.
template <class W>
struct ListedWord {
    __device__ __forceinline__ u32 operator()(int, int, float value, u32 meta) const {
        return W::BITS == 16 || !SCALED ? __float_as_uint(value) : W::word(value, meta);
    }
};

struct Listed {
    int count;
    float enlarged;  // by which power of two the list's values were multiplied
};

// List the values whose bit in keep is set: row(i) of each, and word(group, i, value, meta(group, i)) for so many
// groups, STRIDE words apart; in the order of threads. ENLARGED: values times a power of two that makes the largest 1
// to 2. IN_PLACE: meta reads what words replace. Whatever this thread has fetched is there for the whole block before.
template <bool ENLARGED, bool IN_PLACE, int GROUPS, int STRIDE, int COUNT, class Row, class Meta, class Word>
__device__ __forceinline__ Listed compact(const float (&values)[COUNT], u32 keep, u32* words, Row row, Meta meta,
                                          Word word, Shared& s) {
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
    u32 metas[IN_PLACE ? COUNT : 1][IN_PLACE ? GROUPS : 1];
    if constexpr (IN_PLACE) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
#pragma unroll
            for (int group = 0; group < GROUPS; group++) metas[i][group] = keep >> i & 1 ? meta(group, i) : 0;
        __syncthreads();
    }
    int at = inclusive - mine, total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        const int count = s.warp_counts[i];
        at += i < warp ? count : 0;
        total += count;
        if (ENLARGED && s.warp_largest[i] > largest) largest = s.warp_largest[i];
    }
    const u32 exponent = largest >> 23 < 1 ? 127 : largest >> 23 > 253 ? 253 : largest >> 23;
    const float factor = ENLARGED ? __uint_as_float(254 - exponent << 23) : 1.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (keep >> i & 1) {
            s.list_rows[at] = (u16)row(i);
#pragma unroll
            for (int group = 0; group < (IN_PLACE ? GROUPS : 0); group++)
                words[group * STRIDE + at] = word(group, i, values[i] * factor, metas[i * IN_PLACE][group * IN_PLACE]);
#pragma unroll 8
            for (int group = 0; group < (IN_PLACE ? 0 : GROUPS); group++)
                words[group * STRIDE + at] = word(group, i, values[i] * factor, meta(group, i));
            at++;
        }
    }
    if (const int rest = total + threadIdx.x; rest < fours(total)) {  // the last four are read together
        s.list_rows[rest] = 0;
        for (int group = 0; group < GROUPS; group++) words[group * STRIDE + rest] = 0;
    }
    __syncthreads();
    return {total, factor};
}
