// What a block keeps in shared memory, and the steps that all its threads take together: sums and lists.
#pragma once

constexpr int X_PAIRS = ceil_div(HIDDEN / 2, THREADS);  // of the residual stream that a thread holds
constexpr int HEAD_GROUPS = ceil_div(HEADS / KV_HEADS, GROUP_HEADS);
constexpr int LIST = max_of(HIDDEN, max_of(ceil_div(HEADS * HEAD_DIM / 2, O_SPLITS) * 2, MLP_GRANULES * GateUp::COLUMNS)) + 8;

struct Shared {
    union {
        Ring ring;
        alignas(16) float slots[THREADS * 16];  // sums of a product; Format::TEAMS * COLUMNS at most
        alignas(16) float attended[WARPS][GROUP_HEADS][HEAD_DIM];
    };
    alignas(16) float list_values[LIST];
    alignas(16) u16 list_rows[LIST];
    alignas(16) float2 parts[THREADS];
    float heads[(GROUP_HEADS + 2) * HEAD_DIM];  // query heads, key and value of an attention unit
    float factors[HEADS * ATTENTION_SPLITS];    // of each split in its head's attention
    float cosines[HEAD_DIM / 2], sines[HEAD_DIM / 2];
    float largest[WARPS][GROUP_HEADS], weight[WARPS][GROUP_HEADS];
    int warp_counts[WARPS];
    float warp_sums[WARPS];
    int warp_tokens[WARPS];
};

static_assert(sizeof(Shared) <= SHARED_BYTES, "plan.py and shared.cuh disagree about shared memory");

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

// List the values whose bit in keep is set, with row(i) of each, in the order of threads; returns how many.
template <int COUNT, class Row>
__device__ __forceinline__ int compact(const float (&values)[COUNT], u32 keep, Row row, Shared& s) {
    const int mine = __popc(keep), lane = lane_of_warp(), warp = warp_of_block();
    int inclusive = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
        const int below = __shfl_up_sync(ALL_LANES, inclusive, distance);
        if (lane >= distance) inclusive += below;
    }
    if (lane == 31) s.warp_counts[warp] = inclusive;
    __syncthreads();
    int at = inclusive - mine, total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        const int count = s.warp_counts[i];
        at += i < warp ? count : 0;
        total += count;
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        if (keep >> i & 1) {
            s.list_values[at] = values[i];
            s.list_rows[at++] = (u16)row(i);
        }
    }
    __syncthreads();
    return total;
}
