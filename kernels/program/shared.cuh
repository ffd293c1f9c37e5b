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
constexpr int O_CHANNELS = ceil_div(HEADS * HEAD_DIM / 2, O_SPLITS) * 2, H_CHANNELS = MLP_GRANULES * GateUp::COLUMNS;
constexpr int LIST = max_of(HIDDEN, max_of(O_CHANNELS, H_CHANNELS)) + 8;  // the longest list, and a rest of four

// Groups of gate that a block's granules touch; of up as many.
constexpr int groups_of(int granules, int of_group) {
    if (granules % of_group == 0) return granules / of_group;
    return of_group % granules == 0 ? 1 : (granules + of_group - 2) / of_group + 1;
}
constexpr int MLP_GROUPS = GateUp::BITS == 16 ? 0 : groups_of(MLP_GRANULES, GateUp::GRANULES_OF_GROUP);

struct Shared {
    union {
        Ring ring;
        float slots[THREADS * 16];  // sums of a product; Format::TEAMS * COLUMNS at most
        alignas(16) float attended[WARPS][GROUP_HEADS][HEAD_DIM];
    };
    union {
        RingWords words;
        u32 panel[PANEL ? 2 * MLP_GROUPS : 1][PANEL ? HIDDEN : 1];
    };
    alignas(16) float list_values[LIST];
    alignas(16) u16 list_rows[LIST];
    alignas(16) float2 parts[THREADS];
    Layer layers[2];  // this one and the next: a pointer that has to be fetched first delays what it points to
    Limits limits[LAYERS];
    float heads[(GROUP_HEADS + 2) * HEAD_DIM];  // query heads, key and value of an attention unit
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

struct Listed {
    int count;
    float enlarged;  // by which power of two the list's values were multiplied
};

// List the values whose bit in keep is set, with row(i) of each, in the order of threads. ENLARGED: times a power of
// two that makes the largest 1 to 2. Whatever this thread has fetched is there for the whole block afterwards.
template <bool ENLARGED, int COUNT, class Row>
__device__ __forceinline__ Listed compact(const float (&values)[COUNT], u32 keep, Row row, Shared& s) {
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
            s.list_values[at] = values[i] * factor;
            s.list_rows[at++] = (u16)row(i);
        }
    }
    __syncthreads();
    return {total, factor};
}
