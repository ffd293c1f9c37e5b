// The sum over a list of rows of value times row, for one granule a team: the part that reads the weights.
//
// A block's teams (formats.cuh) are spread over the granules of its piece of each row, and what is left over them is
// spread over the list. A step is four rows a lane:
//
//     team      0 .. PIECE-1         PIECE .. 2 PIECE-1      ...
//     granule   0 .. PIECE-1         0 .. PIECE-1            ...
//     entries   slot 0               slot 1                  ... of the list, 4 TEAM of them to each slot a step
//
// Rows come by cp.async into a ring, in which every lane reads only what it fetched itself. So nothing waits for
// another lane, and loads of the next steps are in flight during this one's arithmetic without holding registers.
// Weights leave L2 first: what blocks hand each other stays there.
#pragma once

struct Ring {
    uint4 rows[STAGES][4][THREADS];
    u32 meta[STAGES][4][THREADS];
};

struct List {
    float* values;
    u16* rows;
};

// Where a thread stands in a piece of PIECE granules.
template <class W, int PIECE>
struct Place {
    static constexpr int SLOTS = W::TEAMS / PIECE;
    static_assert(SLOTS > 0, "a piece has more granules than a block has teams");
    int slot, granule;
    bool active;

    __device__ Place() {
        const int team = threadIdx.x / W::TEAM;
        slot = team / PIECE, granule = team % PIECE, active = slot < SLOTS;
    }
};

// granule: the place in the row of this thread's 16 bytes. threshold: of the segment that they are in; the list has
// what any segment keeps (MIXED), and the others must not see it.
template <class W, int PIECE, bool MIXED>
__device__ __forceinline__ void gather(Sums<W::BITS>& sums, const Matrix& m, const Place<W, PIECE>& place, int granule,
                                       float threshold, int count, const List& list, Ring& ring) {
    constexpr int STEP = Place<W, PIECE>::SLOTS * W::TEAM * 4;
    const int first = (place.slot * W::TEAM + threadIdx.x % W::TEAM) * 4, steps = ceil_div(count, STEP);
    const u8* const values = m.values + granule * 16;
    const u32* const meta = m.meta + granule / W::GRANULES_OF_GROUP;
    const u64 policy = evict_first();
    auto fetch = [&](int step, int stage) {
        const int entry = step * STEP + first;
        if (place.active && entry < count) {
            const ushort4 four = *(const ushort4*)(list.rows + entry);
            const float4 x = MIXED ? *(const float4*)(list.values + entry) : make_float4(0, 0, 0, 0);
            const u16 rows[4] = {four.x, four.y, four.z, four.w};
            const float values_of[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const bool wanted = entry + r < count && (!MIXED || is_kept(values_of[r], threshold));
                const u32 row = wanted ? rows[r] : 0;
                fetch_row(&ring.rows[stage][r][threadIdx.x], values + (u64)row * W::ROW_BYTES, wanted, policy);
                if (W::BITS < 16) fetch_word(&ring.meta[stage][r][threadIdx.x], meta + row * W::GROUPS, wanted);
            }
        }
        close_fetches();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) fetch(s, s);
    int stage = 0;
    for (int step = 0; step < steps; step++) {
        await_fetches<STAGES - 2>();
        fetch(step + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
        const int entry = step * STEP + first;
        uint4 rows[4] = {};
        u32 words[4] = {};
        float x[4] = {};
        if (place.active && entry < count) {
            const float4 four = *(const float4*)(list.values + entry);
            const float values_of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int r = 0; r < 4; r++) {
                rows[r] = ring.rows[stage][r][threadIdx.x];
                words[r] = W::BITS < 16 ? ring.meta[stage][r][threadIdx.x] : 0;
                const bool wanted = entry + r < count && (!MIXED || is_kept(values_of[r], threshold));
                x[r] = wanted ? values_of[r] : 0.0f;
            }
        }
        sums.add(rows, words, x);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    await_fetches<0>();
}

// Put the sums of all slots side by side, [SLOTS][PIECE * COLUMNS]. The ring must be free: it may lie there, too.
template <class W, int PIECE>
__device__ __forceinline__ void lay_out(Sums<W::BITS>& sums, const Place<W, PIECE>& place, float* slots) {
    float out[W::COLUMNS];
    if (!sums.finish(out) || !place.active) return;
    float4* to = (float4*)(slots + (place.slot * PIECE + place.granule) * W::COLUMNS);
#pragma unroll
    for (int i = 0; i < W::COLUMNS / 4; i++) to[i] = make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
}

// Values 2 pair and 2 pair + 1 of the piece, added over the slots in their order.
template <class W, int PIECE>
__device__ __forceinline__ float2 sum_of_slots(const float* slots, int pair) {
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int s = 0; s < Place<W, PIECE>::SLOTS; s++) {
        const float2 part = ((const float2*)(slots + s * PIECE * W::COLUMNS))[pair];
        total.x += part.x, total.y += part.y;
    }
    return total;
}
