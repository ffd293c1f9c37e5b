// Attention of one new token: flash-decoding (Dao et al. 2023), split over the cache's positions.
//
//     unit    a key/value head and up to GROUP_HEADS of its query heads
//     block   (unit, split): an equal run of the positions; the last one's block stores the new token's key and value
//     warp    one of the query heads, and every so many positions of the run
//     lanes   HEAD_DIM / 8 to a position, 16 bytes of its key and value each
//
// Every block rotates its own query heads: less than a trip to have it done once. What it sends of each head is the
// unnormalised sum, the largest score and the sum of exponentials (both to base 2). Whoever multiplies with o combines
// them, for its own channels only.
#pragma once

constexpr int LANES = HEAD_DIM / 8, SEATS = 32 / LANES;  // of a position; positions of a warp at once
constexpr int SLOT = HEAD_DIM + 2;                       // words of a head and split: sum, largest, weight
constexpr int UNITS = KV_HEADS * HEAD_GROUPS;
constexpr int AHEAD = 4;                                 // rounds of positions, a lane each, that are loaded together
constexpr int PARTS = WARPS / GROUP_HEADS;               // warps of a query head
constexpr float LOG2E = 1.4426950408889634f;

struct Cache {
    u16 *k, *v;
    i64 layer, head, position;  // strides, in elements
};

struct Running {  // softmax so far, of a query head over the positions that a lane has seen
    float largest = NOTHING, weight = 0.0f, sum[8] = {};

    __device__ __forceinline__ void scale(float factor) {
        weight *= factor;
#pragma unroll
        for (int d = 0; d < 8; d++) sum[d] *= factor;
    }

    // part: this lane's part of q k. All lanes of a warp call it; those without a position are not live.
    __device__ __forceinline__ void see(float part, const float (&v)[8], bool live) {
#pragma unroll
        for (int distance = LANES / 2; distance; distance >>= 1) part += __shfl_xor_sync(ALL_LANES, part, distance);
        const float score = live ? part : NOTHING, highest = fmaxf(largest, score);
        const float p = live ? exp2f(score - highest) : 0.0f;
        scale(live ? exp2f(largest - highest) : 1.0f);
        largest = highest, weight += p;
#pragma unroll
        for (int d = 0; d < 8; d++) sum[d] += p * v[d];
    }

    // Add what the lanes at a distance have seen.
    __device__ __forceinline__ void join(int distance) {
        const float highest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
        scale(highest == NOTHING ? 0.0f : exp2f(largest - highest));
        weight += __shfl_xor_sync(ALL_LANES, weight, distance);
#pragma unroll
        for (int d = 0; d < 8; d++) sum[d] += __shfl_xor_sync(ALL_LANES, sum[d], distance);
        largest = highest;
    }
};

__device__ __forceinline__ void widen(float (&to)[8], const uint4& from) {
    const u32 words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; i++) to[2 * i] = low_of(words[i]), to[2 * i + 1] = high_of(words[i]);
}

struct Rounds {
    uint4 k[AHEAD], v[AHEAD];
};

struct Attention {
    int unit, split, kv, begin, end;
    int position;
    bool stores;  // the new token's key and value

    __device__ bool place(int position_, int window) {
        unit = blockIdx.x % UNITS, split = blockIdx.x / UNITS, kv = unit / HEAD_GROUPS, position = position_;
        const int first = window > 0 && position + 1 > window ? position + 1 - window : 0;
        const int length = ceil_div(position + 1 - first, ATTENTION_SPLITS);
        begin = first + split * length;
        end = begin + length < position + 1 ? begin + length : position + 1;
        stores = begin <= position && end == position + 1;
        return split < ATTENTION_SPLITS;
    }

    __device__ int query_head(int h) const { return kv * (HEADS / KV_HEADS) + unit % HEAD_GROUPS * GROUP_HEADS + h; }
    __device__ bool has_head(int h) const {
        return h < GROUP_HEADS && unit % HEAD_GROUPS * GROUP_HEADS + h < HEADS / KV_HEADS;
    }

    // Ask for the first positions while others still work on q, k and v.
    __device__ void prefetch(const Cache& cache, int layer) const {
        constexpr int LINES = HEAD_DIM * 2 / 128 > 0 ? HEAD_DIM * 2 / 128 : 1;
        const int at = begin + threadIdx.x / LINES;
        if (at >= end || at == position) return;
        const i64 offset = layer * cache.layer + kv * cache.head + at * cache.position + threadIdx.x % LINES * 64;
        ::prefetch(cache.k + offset);
        ::prefetch(cache.v + offset);
    }

    // Query heads, the key and the value into s.heads, as q, k and v's product gave them.
    __device__ void take_heads(const u64* qkv, u32 epoch, Shared& s) const {
        constexpr int HALF = HEAD_DIM / 2, COUNT = ceil_div((GROUP_HEADS + 2) * HALF, THREADS);
        float2 loaded[COUNT];
        auto index = [](int i) { return (int)threadIdx.x + i * THREADS; };
        auto wanted = [&](int i) {
            const int h = index(i) / HALF;
            return h < GROUP_HEADS ? has_head(h) : h < GROUP_HEADS + 2 && stores;
        };
        receive(
            loaded, epoch,
            [&](int i) {
                const int h = index(i) / HALF;
                const int from = h < GROUP_HEADS ? query_head(h) : HEADS + (h - GROUP_HEADS) * KV_HEADS + kv;
                return qkv + from * HEAD_DIM + 2 * (index(i) % HALF);
            },
            wanted);
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (wanted(i)) ((float2*)s.heads)[index(i)] = loaded[i];
        __syncthreads();
    }

    // Norm (Qwen3) and rotation of each query head and the key, a warp for each.
    __device__ void rotate(const u16* q_norm, const u16* k_norm, Shared& s) const {
        constexpr int HALF = HEAD_DIM / 2;
        for (int h = warp_of_block(); h <= GROUP_HEADS; h += WARPS) {
            if (h < GROUP_HEADS ? !has_head(h) : !stores) continue;
            float* const x = s.heads + h * HEAD_DIM;
            const u16* const norm = h < GROUP_HEADS ? q_norm : k_norm;
            float squares = 0.0f;
            for (int d = lane_of_warp(); d < HEAD_DIM; d += 32) squares += x[d] * x[d];
            const float scale = norm ? rsqrtf(sum_of_warp(squares) / HEAD_DIM + NORM_EPS) : 1.0f;
            for (int d = lane_of_warp(); d < HALF; d += 32) {
                float a = x[d], b = x[d + HALF];
                if (norm) {
                    a = rounded(rounded(a * scale) * float_of(norm[d]));
                    b = rounded(rounded(b * scale) * float_of(norm[d + HALF]));
                }
                x[d] = rounded(a * s.cosines[d] - b * s.sines[d]);
                x[d + HALF] = rounded(b * s.cosines[d] + a * s.sines[d]);
            }
        }
        __syncthreads();
    }

    __device__ void store_new(const Cache& cache, int layer, const Shared& s) const {
        if (!stores || unit % HEAD_GROUPS != 0) return;
        const i64 offset = layer * cache.layer + kv * cache.head + position * cache.position;
        for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
            cache.k[offset + d] = bits_of(s.heads[GROUP_HEADS * HEAD_DIM + d]);
            cache.v[offset + d] = bits_of(s.heads[(GROUP_HEADS + 1) * HEAD_DIM + d]);
        }
    }

    // This warp's head and first position, and this lane's position at a round from base on.
    static constexpr int STRIDE = PARTS * SEATS;
    __device__ static int head() { return warp_of_block() % GROUP_HEADS; }
    __device__ int first() const {
        const int part = warp_of_block() / GROUP_HEADS;
        return part < PARTS && has_head(head()) ? begin + part * SEATS : end;
    }
    __device__ int at(int base, int round) const { return base + round * STRIDE + lane_of_warp() / LANES; }

    // Ask for the keys and values of AHEAD rounds from base on. The new token's are not in the cache yet.
    __device__ __forceinline__ Rounds load(const Cache& cache, int layer, int base) const {
        const i64 offset = layer * cache.layer + kv * cache.head + lane_of_warp() % LANES * 8;
        Rounds rounds = {};
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int place = at(base, i);
            if (place >= end || place == position) continue;
            rounds.k[i] = *(const uint4*)(cache.k + offset + place * cache.position);
            rounds.v[i] = *(const uint4*)(cache.v + offset + place * cache.position);
        }
        return rounds;
    }

    __device__ __forceinline__ void attend(Running& run, Rounds rounds, const Cache& cache, int layer,
                                           const Shared& s) const {
        const int d = lane_of_warp() % LANES * 8;
        float q[8];
#pragma unroll
        for (int i = 0; i < 8; i++) q[i] = s.heads[head() * HEAD_DIM + d + i] * (LOG2E * ATTENTION_SCALE);
        for (int base = first(); base < end; base += AHEAD * STRIDE) {
            if (base != first()) rounds = load(cache, layer, base);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (base + i * STRIDE >= end) break;  // for all lanes
                float k[8], v[8], part = 0.0f;
                widen(k, rounds.k[i]), widen(v, rounds.v[i]);
                if (stores && at(base, i) == position) {
                    const float* const own = s.heads + GROUP_HEADS * HEAD_DIM + d;
#pragma unroll
                    for (int j = 0; j < 8; j++) k[j] = own[j], v[j] = own[HEAD_DIM + j];
                }
#pragma unroll
                for (int j = 0; j < 8; j++) part += q[j] * k[j];
                run.see(part, v, at(base, i) < end);
            }
        }
    }

    // Join all lanes and warps of each head and send what they have seen.
    __device__ void send_seen(Running& run, u64* attended, u32 epoch, Shared& s) const {
#pragma unroll
        for (int distance = LANES; distance < 32; distance <<= 1) run.join(distance);
        const int warp = warp_of_block(), lane = lane_of_warp();
        if (lane == 0) s.largest[warp] = run.largest, s.weight[warp] = run.weight;
        if (lane < LANES) {
            float4* const to = (float4*)(s.attended[warp] + lane * 8);
            to[0] = make_float4(run.sum[0], run.sum[1], run.sum[2], run.sum[3]);
            to[1] = make_float4(run.sum[4], run.sum[5], run.sum[6], run.sum[7]);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP_HEADS * SLOT / 2; i += THREADS) {
            const int h = i / (SLOT / 2), d = i % (SLOT / 2) * 2;
            if (!has_head(h)) continue;
            float highest = NOTHING, weight = 0.0f;
            float2 total = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int w = h; w < PARTS * GROUP_HEADS; w += GROUP_HEADS) highest = fmaxf(highest, s.largest[w]);
#pragma unroll
            for (int w = h; w < PARTS * GROUP_HEADS; w += GROUP_HEADS) {
                const float factor = highest == NOTHING ? 0.0f : exp2f(s.largest[w] - highest);
                weight += factor * s.weight[w];
                if (d < HEAD_DIM) total.x += factor * s.attended[w][d], total.y += factor * s.attended[w][d + 1];
            }
            u64* const to = attended + ((u64)query_head(h) * ATTENTION_SPLITS + split) * SLOT + d;
            if (d < HEAD_DIM)
                send(to, total.x, total.y, epoch);
            else
                send(to, highest, weight, epoch);
        }
    }
};

// This split's share of attention's output, rounded as its layer does, listed where it reaches the threshold. Eight
// lanes to a pair of channels, which combine the splits of its head.
__device__ __forceinline__ Listed list_attended(const u64* attended, float threshold, int split, u32 epoch, Shared& s) {
    constexpr int LANES_OF_PAIR = 8, COUNT = ceil_div(ATTENTION_SPLITS, LANES_OF_PAIR);
    constexpr int PAIRS = HEADS * HEAD_DIM / 2, PASSES = ceil_div(ceil_div(PAIRS, O_SPLITS), THREADS / LANES_OF_PAIR);
    const int part = threadIdx.x % LANES_OF_PAIR, place = threadIdx.x / LANES_OF_PAIR;
    auto pair = [&](int pass) { return split + (place + pass * (THREADS / LANES_OF_PAIR)) * O_SPLITS; };
    float values[2 * PASSES];
    u32 keep = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int channel = 2 * pair(pass), head = channel / HEAD_DIM;
        const bool live = pair(pass) < PAIRS;
        const u64* const first = attended + ((u64)head * ATTENTION_SPLITS + part) * SLOT;
        float2 seen[2 * COUNT], x = make_float2(0.0f, 0.0f);  // sums, then largest and weight, of each split
        receive(
            seen, epoch,
            [&](int i) {
                return first + i % COUNT * LANES_OF_PAIR * SLOT + (i < COUNT ? channel % HEAD_DIM : HEAD_DIM);
            },
            [&](int i) { return live && part + i % COUNT * LANES_OF_PAIR < ATTENTION_SPLITS; });
        float highest = NOTHING, weight = 0.0f;
#pragma unroll
        for (int i = COUNT; i < 2 * COUNT; i++)
            if (part + i % COUNT * LANES_OF_PAIR < ATTENTION_SPLITS) highest = fmaxf(highest, seen[i].x);
#pragma unroll
        for (int distance = LANES_OF_PAIR / 2; distance; distance >>= 1)
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, distance));
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (part + i * LANES_OF_PAIR >= ATTENTION_SPLITS) continue;
            const float factor = exp2f(seen[COUNT + i].x - highest);
            weight += factor * seen[COUNT + i].y, x.x += factor * seen[i].x, x.y += factor * seen[i].y;
        }
#pragma unroll
        for (int distance = LANES_OF_PAIR / 2; distance; distance >>= 1) {
            weight += __shfl_xor_sync(ALL_LANES, weight, distance);
            x.x += __shfl_xor_sync(ALL_LANES, x.x, distance);
            x.y += __shfl_xor_sync(ALL_LANES, x.y, distance);
        }
        if (!live) weight = 1.0f;
        values[2 * pass] = rounded(x.x / weight), values[2 * pass + 1] = rounded(x.y / weight);
#pragma unroll
        for (int i = 2 * pass; i < 2 * pass + 2; i++)
            if (live && part == 0 && is_kept(values[i], threshold)) keep |= 1u << i;
    }
    auto row = [&](int i) { return 2 * pair(i / 2) + i % 2; };
    auto in_panel = [&](int i) { return (place + i / 2 * (THREADS / LANES_OF_PAIR)) * 2 + i % 2; };
    return compact<O, O_GROUPS, O_CHANNELS>(values, keep, row, in_panel, s);
}
