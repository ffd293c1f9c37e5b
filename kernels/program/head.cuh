// The output head and the argmax, in fp32. Block b has a run of the vocabulary, so nothing is added up.
//
//     HEAD_BITS 16    [V, C] as nn.Linear has it: a warp takes four rows at once
//     HEAD_BITS 8, 4  [C, V] as packing.py has it: gather over a list of all channels
#pragma once

struct Best {  // the largest logit and the first place of it; a NaN is larger than all
    float logit;
    int token;

    __device__ void see(float x, int at) {
        if (x != x) x = -NOTHING;
        if (x > logit || (x == logit && at < token)) logit = x, token = at;
    }

    __device__ void see_block(Shared& s) {
#pragma unroll
        for (int distance = 16; distance; distance >>= 1) {
            const float other = __shfl_xor_sync(ALL_LANES, logit, distance);
            see(other, __shfl_xor_sync(ALL_LANES, token, distance));
        }
        __syncthreads();
        if (lane_of_warp() == 0) s.warp_sums[warp_of_block()] = logit, s.warp_tokens[warp_of_block()] = token;
        __syncthreads();
        for (int i = 0; i < WARPS; i++) see(s.warp_sums[i], s.warp_tokens[i]);
    }
};

// Logits of x, fp32 [HIDDEN].
__device__ __forceinline__ void float_head(const Matrix& m, const float* of_x, float* logits, Best& best) {
    constexpr int ROWS = 4, PER_BLOCK = ceil_div(VOCAB, GRID);
    const int end = (blockIdx.x + 1) * PER_BLOCK < VOCAB ? (blockIdx.x + 1) * PER_BLOCK : VOCAB;
    for (int row = blockIdx.x * PER_BLOCK + warp_of_block() * ROWS; row < end; row += WARPS * ROWS) {
        float sum[ROWS] = {};
#pragma unroll 2
        for (int c = lane_of_warp(); c < HIDDEN / 8; c += 32) {
            const float4 a = ((const float4*)of_x)[2 * c], b = ((const float4*)of_x)[2 * c + 1];
            const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const int at = row + r < end ? row + r : end - 1;
                float w[8];
                widen(w, read_once(m.values + ((u64)at * HIDDEN + 8 * c) * 2));
#pragma unroll
                for (int i = 0; i < 8; i++) sum[r] += x[i] * w[i];
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float logit = sum_of_warp(sum[r]);
            if (row + r >= end) continue;
            best.see(logit, row + r);
            if (lane_of_warp() == 0) logits[row + r] = logit;
        }
    }
}

template <class W>
__device__ __forceinline__ void quantized_head(const Matrix& m, float* logits, Best& best, Listed listed, Shared& s) {
    auto part = [&](const Place<W, HEAD_PIECE>& place) -> Part {
        const int granule = blockIdx.x * HEAD_PIECE + place.granule;
        return {m.values + granule * 16, m.meta + granule / W::GRANULES_OF_GROUP, granule < W::GRANULES, 0.0f};
    };
    SumsOf<W> sums;
    gather<W, HEAD_PIECE, false, false>(sums, part, s.list(listed), s.ring, s.ring_words[0][0], [] {});
    const float unscale = (float)m.unscale / listed.enlarged;
    __syncthreads();
    lay_out<W, HEAD_PIECE>(sums, s.slots);
    __syncthreads();
    for (int four = threadIdx.x; four < HEAD_PIECE * W::COLUMNS / 4; four += THREADS) {
        const int at = blockIdx.x * HEAD_PIECE + 4 * four / W::COLUMNS;
        if (at >= W::GRANULES) continue;
        const float4 sum = sum_of_slots<W, HEAD_PIECE>(s.slots, four, unscale);
        const int column = W::column(at, 4 * four % W::COLUMNS);
        *(float4*)(logits + column) = sum;
        best.see(sum.x, column), best.see(sum.y, column + 1), best.see(sum.z, column + 2), best.see(sum.w, column + 3);
    }
}

// The argmax of what all blocks found, into token, and position moved on.
__device__ __forceinline__ void take_token(Best best, u64* found, i64* token, i64* position, u32 epoch, Shared& s) {
    best.see_block(s);
    if (threadIdx.x == 0) send(found + 2 * blockIdx.x, best.logit, __int_as_float(best.token), epoch);
    if (blockIdx.x != 0) return;
    constexpr int COUNT = ceil_div(GRID, THREADS);
    float2 of_block[COUNT];
    auto block = [](int i) { return (int)threadIdx.x + i * THREADS; };
    receive(of_block, epoch, [&](int i) { return found + 2 * block(i); }, [&](int i) { return block(i) < GRID; });
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (block(i) < GRID) best.see(of_block[i].x, __float_as_int(of_block[i].y));
    best.see_block(s);
    if (threadIdx.x == 0) *token = best.token, *position += 1;
}
