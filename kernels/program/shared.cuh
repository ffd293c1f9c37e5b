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

constexpr int HEAD_GROUPS = ceil_div(HEADS / KV_HEADS, GROUP_HEADS);
constexpr int ROW = HEAD_DIM + 32;  // of a head in 16 bits: rows two apart are off the same banks

// The longest list of rows that a panel has scales of, and the longest of all: the head's.
constexpr int PANEL_ROWS = max_of(max_of(GatePanel::ROWS, QkvPanel::ROWS), max_of(OPanel::ROWS, DownPanel::ROWS));
constexpr int LIST = max_of(X_CHANNELS + HEAD_SECONDS, PANEL_ROWS), PLACES = SCALED ? PANEL_ROWS : 4;
constexpr bool FETCHES_META = HEAD_BITS < 16 || (!SCALED && GateUp::BITS < 16);  // row by row, through the ring

struct Listed {
    int count;
    float enlarged;  // by which power of two the list's values were multiplied
};

struct Shared {
    union {
        Ring ring;
        float slots[THREADS * 16];  // sums of a product; Format::TEAMS * COLUMNS at most
        alignas(16) float attended[WARPS][GROUP_HEADS][HEAD_DIM];
    };
    union {
        u32 ring_words[FETCHES_META ? STAGES : 1][4][FETCHES_META ? THREADS : 1];
        struct {
            alignas(16) u32 mlp_panel[2 * GatePanel::WORDS];
            alignas(16) u32 qkv_panel[QkvPanel::WORDS];
            alignas(16) u32 o_panel[OPanel::WORDS];
            alignas(16) u32 down_panel[DownPanel::WORDS];
        };
    };
    alignas(16) float list_values[LIST];
    alignas(16) u16 list_rows[LIST], list_places[PLACES];
    alignas(16) float4 parts[THREADS];
    Layer layers[2];  // this one and the next: a pointer that has to be fetched first delays what it points to
    Limits limits[LAYERS];
    alignas(16) float heads[(GROUP_HEADS + 1) * HEAD_DIM];  // query heads and key of an attention unit
    alignas(16) u16 rows[GROUP_HEADS + 2][ROW];             // the same, rotated, and the value
    alignas(16) float cosines[HEAD_DIM / 2], sines[HEAD_DIM / 2], head_scales[GROUP_HEADS + 1];
    float largest[WARPS][GROUP_HEADS], weight[WARPS][GROUP_HEADS];
    alignas(16) int warp_counts[WARPS];
    alignas(16) u32 warp_largest[WARPS];
    alignas(16) float warp_sums[WARPS];
    int warp_tokens[WARPS];

    __device__ __forceinline__ List list(Listed listed, int first_group = 0) const {
        return {list_rows, list_places, list_values, listed.count, first_group};
    }
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

__device__ __forceinline__ void await_all_fetches() {
    close_fetches();
    await_fetches<0>();
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

// The bits of a thread's values that reach the threshold, of the fours that it has.
template <int COUNT, class Has>
__device__ __forceinline__ u32 kept(const float (&values)[COUNT], Has has, float threshold) {
    u32 keep = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (has(i / 4) && is_kept(values[i], threshold)) keep |= 1u << i;
    return keep;
}

// A list of the values whose bit in keep is set. It has row(i) of each and, with a panel, where its scales are there.
// ENLARGED: values are multiplied by a power of two that makes the largest 1 to 2. AWAITS: whatever was asked for
// before is there afterwards. Warps count by votes, which are fewer instructions than a scan by shuffles.
template <bool HAS_PLACES, bool ENLARGED, bool AWAITS, int COUNT, class Mask, class Row, class Place>
__device__ __forceinline__ Listed compact(const float (&values)[COUNT], Mask keep, Row row, Place place, Shared& s) {
    static_assert(COUNT <= 8 * sizeof(Mask), "a bit for each value");
    const int lane = lane_of_warp(), warp = warp_of_block();
    u32 votes[COUNT], largest = 0;
    int mine = 0, at = 0, total = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        votes[i] = __ballot_sync(ALL_LANES, (int)(keep >> i & 1)), mine += __popc(votes[i]);
        const u32 size = __float_as_uint(fabsf(values[i]));
        if (ENLARGED && (keep >> i & 1) && size > largest) largest = size;
    }
    if (ENLARGED) largest = __reduce_max_sync(ALL_LANES, largest);
    if (lane == 0) s.warp_counts[warp] = mine, s.warp_largest[warp] = largest;
    if (AWAITS) await_all_fetches();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        const int count = s.warp_counts[i];
        at += i < warp ? count : 0;
        total += count;
        if (ENLARGED && s.warp_largest[i] > largest) largest = s.warp_largest[i];
    }
    const u32 exponent = largest >> 23 < 1 ? 127 : largest >> 23 > 253 ? 253 : largest >> 23;
    const float enlarged = ENLARGED ? __uint_as_float(254 - exponent << 23) : 1.0f;
    auto put = [&](int at, int row, float value, int place) {
        s.list_rows[at] = (u16)row, s.list_values[at] = value;
        if (HAS_PLACES) s.list_places[at] = (u16)place;
    };
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (keep >> i & 1) put(at + __popc(votes[i] & ((1u << lane) - 1)), row(i), values[i] * enlarged, place(i));
        at += __popc(votes[i]);
    }
    const int rest = total + threadIdx.x;
    if (rest < fours(total)) put(rest, 0, 0.0f, 0);  // the last four are read together
    __syncthreads();
    return {total, enlarged};
}

// For each of a thread's channels its second row and, in the upper half, that row's place among the block's; 0 without
// one. A block has SECONDS at most. Channels are asked for UNIT neighbours at a time.
template <int SECONDS, int COUNT, int UNIT = 4>
struct Seconds {
    u32 words[COUNT];

    template <class Channel, class Has>
    __device__ __forceinline__ void load(const Matrix& m, Channel channel, Has has) {
        if (!SECONDS) return;
#pragma unroll
        for (int i = 0; i < COUNT; i += UNIT) {
            u32 unit[UNIT] = {};
            if (has(i / UNIT)) read_bytes<4 * UNIT>(unit, m.second + channel(i / UNIT));
#pragma unroll
            for (int j = 0; j < UNIT; j++) words[i + j] = unit[j];
        }
    }
};

// compact for a product whose list has CHANNELS channels of a block and their second rows: those stand after all
// channels in the panel.
template <int BITS, int CHANNELS, bool HAS_PLACES, bool AWAITS, int SECONDS, int COUNT, int UNIT, class Row,
          class Place>
__device__ __forceinline__ Listed list_rows(const float (&values)[COUNT], u32 keep, Row row, Place place,
                                            const Seconds<SECONDS, COUNT, UNIT>& seconds, Shared& s) {
    if constexpr (SECONDS == 0) {
        return compact<HAS_PLACES, BITS == 4, AWAITS>(values, keep, row, place, s);
    } else {
        float both[2 * COUNT];
        u64 keep_both = keep;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            both[i] = both[COUNT + i] = values[i];
            if ((keep >> i & 1) && seconds.words[i]) keep_both |= (u64)1 << (COUNT + i);
        }
        auto any_row = [&](int i) { return i < COUNT ? row(i) : (int)(seconds.words[i - COUNT] & 0xffff); };
        auto any_place = [&](int i) {
            return i < COUNT ? place(i) : CHANNELS + (int)(seconds.words[i - COUNT] >> 16);
        };
        return compact<HAS_PLACES, BITS == 4, AWAITS>(both, keep_both, any_row, any_place, s);
    }
}

// Of a product with a panel.
template <class P, bool AWAITS = true, int COUNT, int UNIT, class Row, class Place>
__device__ __forceinline__ Listed list_rows(const float (&values)[COUNT], u32 keep, Row row, Place place,
                                            const Seconds<P::SECONDS, COUNT, UNIT>& seconds, Shared& s) {
    return list_rows<P::W::BITS, P::CHANNELS, P::HAS_PLACES, AWAITS>(values, keep, row, place, seconds, s);
}
