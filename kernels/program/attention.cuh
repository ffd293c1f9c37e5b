// Attention of one new token: flash-decoding (Dao et al. 2023), split over the cache's positions.
//
//     unit    a key/value head and up to GROUP_HEADS of its query heads
//     block   (unit, split): an equal run of the positions. It adds up the partial sums of its query heads; the last
//             run's block also those of the new token's key and value, which it stores
//     seat    one or two warps: every so many tiles of 16 positions, for all heads of the unit, on tensor cores
//
// Two products, scores [heads, positions] = queries keys^T and sums [channels, heads] += values^T weights^T. The first
// leaves in lane 4 g + c what the second wants there: head g, positions 2 c, 2 c + 1 and 8 more. Channels may come in
// any order that both sides share, so a lane reads neighbouring ones (cache.cuh).
//
// Every block rotates its own query heads: less than a trip to have it done once. What it sends of each head is the
// unnormalised sum, the largest score and the sum of exponentials (both to base 2). Whoever multiplies with o combines
// them, for its own channels only.
#pragma once

constexpr int SLOT = HEAD_DIM + 2;  // words of a head and split: sum, largest, weight
constexpr int UNITS = KV_HEADS * HEAD_GROUPS;
constexpr bool READS_AHEAD = THREADS <= 256;  // the next tile during this one's arithmetic; more are short of registers
constexpr float LOG2E = 1.4426950408889634f;

// Softmax so far of a warp's tiles. Lane 4 g + c has the largest score of head g and its own part of the weights. Its
// sums are of heads 2 c and 2 c + 1.
struct Running {
    float largest = NOTHING, weight = 0.0f, sums[OWN_PIECES][VALUE_WORDS][4] = {};

    // Which channel of its head sums[piece][i][j] is; the head is 2 c + j % 2.
    __device__ __forceinline__ static int channel(int piece, int i, int j) {
        return (8 * (Tile::first_piece() + piece) + lane_of_warp() / 4) * 2 * VALUE_WORDS + i + j / 2 * VALUE_WORDS;
    }

    // queries: rows of 16-bit floats; places from live on do not count.
    __device__ __forceinline__ void see(const Tile& tile, const u16 (&queries)[GROUP_HEADS + 2][ROW], int live) {
        const int g = lane_of_warp() / 4, c = lane_of_warp() % 4;
        float scores[2][4] = {};
#pragma unroll
        for (int j = 0; j < KEY_PIECES; j++) {
            u32 q[KEY_WORDS];
            read_bytes<4 * KEY_WORDS>(q, queries[g % GROUP_HEADS] + 2 * KEY_WORDS * (4 * j + c));
#pragma unroll
            for (int i = 0; i < KEY_WORDS; i += 2)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    multiply_add<FLOAT_IS_BF16>(scores[half], {q[i], 0, q[i + 1], 0},
                                                {tile.keys[half][j][i], tile.keys[half][j][i + 1]});
        }
        float p[4], highest = largest;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p[i] = Tile::value_place(i) < live ? scores[i / 2][i % 2] * (LOG2E * ATTENTION_SCALE) : NOTHING;
            highest = fmaxf(highest, p[i]);
        }
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, 2));
        const float factor = exp2f(largest - highest);
        const float factors[2] = {__shfl_sync(ALL_LANES, factor, 8 * c), __shfl_sync(ALL_LANES, factor, 8 * c + 4)};
        largest = highest, weight *= factor;
        u16 bits[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            bits[i] = bits_of(exp2f(p[i] - highest));
            weight += float_of(bits[i]);
        }
        const u32 weights[2] = {bits[0] | (u32)bits[1] << 16, bits[2] | (u32)bits[3] << 16};
#pragma unroll
        for (int j = 0; j < OWN_PIECES; j++)
#pragma unroll
            for (int i = 0; i < VALUE_WORDS; i++) {
                auto pair = [&](int first, int channel) {  // of two neighbouring positions
                    return __byte_perm(tile.values[first][j][channel / 2], tile.values[first + 1][j][channel / 2],
                                       channel % 2 ? 0x7632 : 0x5410);
                };
#pragma unroll
                for (int k = 0; k < 4; k++) sums[j][i][k] *= factors[k % 2];
                multiply_add<FLOAT_IS_BF16>(
                    sums[j][i], {pair(0, i), pair(0, i + VALUE_WORDS), pair(2, i), pair(2, i + VALUE_WORDS)}, weights);
            }
    }
};

struct Attention {
    int unit, split, splits, kv, begin, end;
    int position;
    bool stores;  // the new token's key and value

    __device__ bool place(int position_, int window) {
        unit = blockIdx.x % UNITS, split = blockIdx.x / UNITS, kv = unit / HEAD_GROUPS, position = position_;
        const int first = window > 0 && position + 1 > window ? position + 1 - window : 0;
        splits = min_of(ceil_div(position + 1 - first, POSITIONS_OF_SPLIT), ATTENTION_SPLITS);
        const int length = ceil_div(position + 1 - first, splits);
        begin = first + split * length;
        end = begin + length < position + 1 ? begin + length : position + 1;
        stores = begin <= position && end == position + 1;
        return split < splits;
    }

    __device__ int query_head(int h) const { return kv * (HEADS / KV_HEADS) + unit % HEAD_GROUPS * GROUP_HEADS + h; }
    __device__ bool has_head(int h) const {
        return h < GROUP_HEADS && unit % HEAD_GROUPS * GROUP_HEADS + h < HEADS / KV_HEADS;
    }

    // Ask for the first positions while others still work on q, k and v.
    __device__ void prefetch(const Cache& cache, int layer) const {
        constexpr int LINE = 128 / sizeof(Cached), LINES = ceil_div(CACHE_WIDTH, LINE);
        const int at = begin + threadIdx.x / LINES;
        if (at >= end || at == position) return;
        const i64 offset = vector_of(cache, layer, at) + threadIdx.x % LINES * LINE;
        ::prefetch(cache.k + offset);
        ::prefetch(cache.v + offset);
    }

    // Query heads and the key into s.heads, from the partial sums of q, k and v; the value into its row.
    __device__ void take_heads(const Matrix& m, const uint4* parts, u32 epoch, Shared& s) const {
        constexpr int FOURS = HEAD_DIM / 4;
#pragma unroll 1
        for (int i = threadIdx.x; i / 32 * 32 < (GROUP_HEADS + 2) * FOURS; i += THREADS) {  // whole warps
            const int h = i / FOURS, d = 4 * (i % FOURS);
            const bool wanted = h < GROUP_HEADS ? has_head(h) : h < GROUP_HEADS + 2 && stores;
            const int head = h < GROUP_HEADS ? query_head(h) : HEADS + (h - GROUP_HEADS) * KV_HEADS + kv;
            const int column = wanted ? head * HEAD_DIM + d : 0;
            float4 loaded[QKV_SPLITS], sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            receive(
                loaded, epoch, [&](int split) { return parts + (split * Qkv::N + column) / 4; },
                [&](int) { return wanted; });
#pragma unroll
            for (int split = 0; split < QKV_SPLITS; split++) add_to(sum, loaded[split]);
            if (!wanted) continue;
            add_bias(sum, m, column);
            const uint2 bits = make_uint2(pair_of(sum.x, sum.y), pair_of(sum.z, sum.w));
            if (h <= GROUP_HEADS)
                ((float4*)s.heads)[i] = make_float4(low_of(bits.x), high_of(bits.x), low_of(bits.y), high_of(bits.y));
            else
                *(uint2*)&s.rows[h][d] = bits;
        }
        __syncthreads();
    }

    // What the norm (Qwen3) multiplies each query head and the key with, a warp for each.
    __device__ void scale_heads(Shared& s) const {
        for (int h = warp_of_block(); h <= GROUP_HEADS; h += WARPS) {
            float squares = 0.0f;
            for (int d = lane_of_warp(); d < HEAD_DIM; d += 32) {
                const float x = s.heads[h * HEAD_DIM + d];
                squares += x * x;
            }
            squares = sum_of_warp(squares);
            if (lane_of_warp() == 0) s.head_scales[h] = rsqrtf(squares / HEAD_DIM + NORM_EPS);
        }
        __syncthreads();
    }

    // Norm and rotation of each query head and the key into its row, channels d, d + 1 and those half a head on.
    __device__ void rotate(const u16* q_norm, const u16* k_norm, Shared& s) const {
        constexpr int HALF = HEAD_DIM / 2;
        if (q_norm) scale_heads(s);
#pragma unroll 1
        for (int i = threadIdx.x; i < (GROUP_HEADS + 1) * HALF / 2; i += THREADS) {
            const int h = i / (HALF / 2), d = i % (HALF / 2) * 2;
            if (h < GROUP_HEADS ? !has_head(h) : !stores) continue;
            const u16* const norm = h < GROUP_HEADS ? q_norm : k_norm;
            const float* const x = s.heads + h * HEAD_DIM + d;
            float2 a = *(const float2*)x, b = *(const float2*)(x + HALF);
            if (norm) {
                const u32 low = *(const u32*)(norm + d), high = *(const u32*)(norm + d + HALF);
                const float scale = s.head_scales[h];
                a.x = normed(a.x, scale, low_of(low)), a.y = normed(a.y, scale, high_of(low));
                b.x = normed(b.x, scale, low_of(high)), b.y = normed(b.y, scale, high_of(high));
            }
            const float2 cosine = *(const float2*)(s.cosines + d), sine = *(const float2*)(s.sines + d);
            *(u32*)&s.rows[h][d] = pair_of(a.x * cosine.x - b.x * sine.x, a.y * cosine.y - b.y * sine.y);
            *(u32*)&s.rows[h][d + HALF] = pair_of(b.x * cosine.x + a.x * sine.x, b.y * cosine.y + a.y * sine.y);
        }
        __syncthreads();
    }

    // The new token's key and value into the cache. Of 8 bits, their rows become what it gives back.
    template <class Element>
    __device__ void store_new(const CacheOf<Element>& cache, int layer, Shared& s) const {
        if constexpr (sizeof(Element) == 1) {
            if (!stores) return;
            const i64 offset = vector_of(cache, layer, position);
            const bool writes = unit % HEAD_GROUPS == 0;
            for (int i = warp_of_block(); i < 2; i += WARPS)
                round_to_int8(s.rows[GROUP_HEADS + i], writes ? (i ? cache.v : cache.k) + offset : nullptr);
            __syncthreads();
        } else {
            if (!stores || unit % HEAD_GROUPS != 0) return;
            const i64 offset = vector_of(cache, layer, position);
            for (int d = threadIdx.x; d < HEAD_DIM; d += THREADS) {
                cache.k[offset + d] = s.rows[GROUP_HEADS][d];
                cache.v[offset + d] = s.rows[GROUP_HEADS + 1][d];
            }
        }
    }

    __device__ i64 vector_of(const Cache& cache, int layer, int at) const {
        return layer * cache.layer + kv * cache.head + at * cache.position;
    }

    // A position's vector in the cache. The new token's key and value are not there yet.
    __device__ const Cached* cached(const Cached* from, const Cache& cache, int layer, int at) const {
        return at < end && at != position ? from + vector_of(cache, layer, at) : nullptr;
    }

    __device__ __forceinline__ void read(TileOf<Cached>& found, const Cache& cache, int layer, int base) const {
        found = {};
        found.read_keys([&](int place) { return cached(cache.k, cache, layer, base + place); });
        found.read_values([&](int place) { return cached(cache.v, cache, layer, base + place); });
    }

    __device__ __forceinline__ void attend(Running& run, const Cache& cache, int layer, const Shared& s) const {
        TileOf<Cached> found;
        int base = begin + warp_of_block() / TILE_WARPS * TILE;
        if (READS_AHEAD) read(found, cache, layer, base);
#pragma unroll 1
        for (; base < end; base += SEATS * TILE) {
            if (!READS_AHEAD) read(found, cache, layer, base);
            Tile tile = floats_of(found);
            const int next = base + SEATS * TILE;
            if (READS_AHEAD && next < end) read(found, cache, layer, next);
            if (stores && position < base + TILE) {
                auto own = [&](int place, int row) { return base + place == position ? s.rows[row] : nullptr; };
                tile.read_keys([&](int place) { return own(place, GROUP_HEADS); });
                tile.read_values([&](int place) { return own(place, GROUP_HEADS + 1); });
            }
            run.see(tile, s.rows, end - base);
        }
    }

    // Join the seats of each head and send what they have seen.
    __device__ void send_seen(Running& run, u64* attended, u32 epoch, Shared& s) const {
        const int seat = warp_of_block() / TILE_WARPS, g = lane_of_warp() / 4, c = lane_of_warp() % 4;
        const int seats = end > begin ? min_of(SEATS, ceil_div(end - begin, TILE)) : 0;
        if (seat < seats) {
            run.weight += __shfl_xor_sync(ALL_LANES, run.weight, 1);
            run.weight += __shfl_xor_sync(ALL_LANES, run.weight, 2);
            if (c == 0 && g < GROUP_HEADS) s.largest[seat][g] = run.largest, s.weight[seat][g] = run.weight;
#pragma unroll
            for (int j = 0; j < OWN_PIECES; j++)
#pragma unroll
                for (int i = 0; i < VALUE_WORDS; i++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        if (const int h = 2 * c + k % 2; h < GROUP_HEADS)
                            s.attended[seat][h][Running::channel(j, i, k)] = run.sums[j][i][k];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP_HEADS * HEAD_DIM / 2; i += THREADS) {
            const int h = i / (HEAD_DIM / 2), d = i % (HEAD_DIM / 2) * 2;
            if (!has_head(h)) continue;
            float highest = NOTHING, weight = 0.0f;
            float2 total = make_float2(0.0f, 0.0f);
            for (int w = 0; w < seats; w++) highest = fmaxf(highest, s.largest[w][h]);
#pragma unroll 4
            for (int w = 0; w < seats; w++) {
                const float factor = exp2f(s.largest[w][h] - highest);
                weight += factor * s.weight[w][h];
                total.x += factor * s.attended[w][h][d], total.y += factor * s.attended[w][h][d + 1];
            }
            u64* const to = attended + ((u64)query_head(h) * ATTENTION_SPLITS + split) * SLOT;
            send(to + d, total.x, total.y, epoch);
            if (d == 0) send(to + HEAD_DIM, highest, weight, epoch);
        }
    }
};

// This split's share of attention's output, rounded as its layer does, listed where it reaches the threshold.
// LANES_OF_PAIR lanes to a pair of channels, which combine the splits of its head. o's panel is there before.
__device__ __forceinline__ Listed list_attended(const Matrix& m, const u64* attended, int splits, float threshold,
                                                int split, u32 epoch, Shared& s) {
    constexpr int COUNT = ceil_div(ATTENTION_SPLITS, LANES_OF_PAIR);
    constexpr int PAIRS = HEADS * HEAD_DIM / 2, OF_SPLIT = O_CHANNELS / 2;
    constexpr int AT_ONCE = THREADS / LANES_OF_PAIR, PASSES = ceil_div(OF_SPLIT, AT_ONCE);
    const int part = threadIdx.x % LANES_OF_PAIR, place = threadIdx.x / LANES_OF_PAIR;
    auto pair = [&](int pass) { return channel_of_o(split, 2 * (place + pass * AT_ONCE)) / 2; };
    auto has = [&](int pass) { return place + pass * AT_ONCE < OF_SPLIT && pair(pass) < PAIRS; };
    float values[2 * PASSES];
    Seconds<O_SECONDS, 2 * PASSES, 2> seconds;
    seconds.load(m, [&](int pass) { return 2 * pair(pass); }, [&](int pass) { return part == 0 && has(pass); });
    u32 keep = 0;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        const int channel = 2 * pair(pass), head = channel / HEAD_DIM;
        const bool live = has(pass);
        const u64* const first = attended + ((u64)head * ATTENTION_SPLITS + part) * SLOT;
        float2 seen[2 * COUNT], x = make_float2(0.0f, 0.0f);  // sums, then largest and weight, of each split
        receive(
            seen, epoch,
            [&](int i) {
                return first + i % COUNT * LANES_OF_PAIR * SLOT + (i < COUNT ? channel % HEAD_DIM : HEAD_DIM);
            },
            [&](int i) { return live && part + i % COUNT * LANES_OF_PAIR < splits; });
        float highest = NOTHING, weight = 0.0f;
#pragma unroll
        for (int i = COUNT; i < 2 * COUNT; i++)
            if (part + i % COUNT * LANES_OF_PAIR < splits) highest = fmaxf(highest, seen[i].x);
#pragma unroll
        for (int distance = LANES_OF_PAIR / 2; distance; distance >>= 1)
            highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, distance));
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (part + i * LANES_OF_PAIR >= splits) continue;
            const float factor = exp2f(seen[COUNT + i].x - highest);
            weight += factor * seen[COUNT + i].y, x.x += factor * seen[i].x, x.y += factor * seen[i].y;
        }
#pragma unroll
        for (int distance = LANES_OF_PAIR / 2; distance; distance >>= 1) {
            weight += __shfl_xor_sync(ALL_LANES, weight, distance);
            x.x += __shfl_xor_sync(ALL_LANES, x.x, distance);
            x.y += __shfl_xor_sync(ALL_LANES, x.y, distance);
        }
        const float share = live ? 1.0f / weight : 0.0f;
        values[2 * pass] = rounded(x.x * share), values[2 * pass + 1] = rounded(x.y * share);
#pragma unroll
        for (int i = 2 * pass; i < 2 * pass + 2; i++)
            if (live && part == 0 && is_kept(values[i], threshold)) keep |= 1u << i;
    }
    auto row = [&](int i) { return 2 * pair(i / 2) + i % 2; };
    auto in_panel = [&](int i) { return (place + i / 2 * AT_ONCE) * 2 + i % 2; };
    return list_rows<OPanel, false>(values, keep, row, in_panel, seconds, s);
}
