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
//
// Scales and zeros come in one of two ways. RowByRow fetches a word beside each granule: where a piece has several
// groups, they share a sector of 32 bytes. Panel has those of all channels already, for gate and up: a block's piece
// has one group there, whose words would each cost a sector. Measured so, they took 8.7 us of 41 in a dense layer of
// Llama-3-8B in int4.
#pragma once

struct Ring {
    uint4 rows[STAGES][4][THREADS];
};

using RingWords = u32[STAGES][4][THREADS];

// Where a thread is in the ring: its own place in the stages, one after the other. Kept as a pointer that moves on, not
// as the number of a stage: from that NVRTC 13.0 makes an address in two registers of a kind that cp.async with a cache
// policy has no room for, and the GPU refuses the instruction.
template <class T>
struct Turn {
    T* at;
    T* const end;

    __device__ __forceinline__ explicit Turn(T (&first)[THREADS])
        : at(&first[threadIdx.x]), end(&first[threadIdx.x] + STAGES * 4 * THREADS) {}
    __device__ __forceinline__ T* row(int r) const { return at + r * THREADS; }
    __device__ __forceinline__ void next() {
        at += 4 * THREADS;
        if (at == end) at -= STAGES * 4 * THREADS;
    }
};

struct List {
    const float* values;
    const u16* rows;
};

// Four neighbouring entries of a list from entry on, before end. threshold: of MIXED lists, which have what any segment
// of the output keeps; an entry that this one drops is not wanted. What is not wanted is row 0 times 0.
template <bool MIXED>
struct Four {
    float x[4] = {};
    int rows[4] = {};
    bool wanted[4] = {};

    __device__ __forceinline__ Four(const List& list, int entry, int end, float threshold) {
        if (entry >= end) return;
        const float4 values = *(const float4*)(list.values + entry);
        const ushort4 of_list = *(const ushort4*)(list.rows + entry);
        const float found[4] = {values.x, values.y, values.z, values.w};
        const u16 places[4] = {of_list.x, of_list.y, of_list.z, of_list.w};
#pragma unroll
        for (int r = 0; r < 4; r++) {
            wanted[r] = entry + r < end && (!MIXED || is_kept(found[r], threshold));
            x[r] = wanted[r] ? found[r] : 0.0f;
            rows[r] = wanted[r] ? places[r] : 0;
        }
    }
};

template <class W, int STRIDE = W::GROUPS>  // words from a row to the next
struct RowByRow {
    const u32* meta;  // of this thread's group, in row 0
    Turn<u32> fetched, used;

    __device__ __forceinline__ RowByRow(const u32* meta, RingWords& ring)
        : meta(meta), fetched(ring[0][0]), used(ring[0][0]) {}
    __device__ __forceinline__ void fetch(int r, int row, bool wanted) {
        if (W::BITS < 16) fetch_word(fetched.row(r), meta + row * STRIDE, wanted);
    }
    __device__ __forceinline__ u32 read(int r, int) { return W::BITS < 16 ? *used.row(r) : 0; }
    __device__ __forceinline__ void next_fetch() { fetched.next(); }
    __device__ __forceinline__ void next_use() { used.next(); }
};

template <class W>
struct Panel {
    const u32* words;  // of this thread's group, one for each row

    __device__ __forceinline__ void fetch(int, int, bool) {}
    __device__ __forceinline__ u32 read(int, int row) { return W::BITS < 16 ? words[row] : 0; }
    __device__ __forceinline__ void next_fetch() {}
    __device__ __forceinline__ void next_use() {}
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

// weights: row 0 of this thread's granule. threshold: of the segment that it is in (Four).
template <class W, int PIECE, bool MIXED, class Meta>
__device__ __forceinline__ void gather(Sums<W::BITS>& sums, const u8* weights, Meta meta, const Place<W, PIECE>& place,
                                       float threshold, int count, const List& list, Ring& ring) {
    constexpr int STEP = Place<W, PIECE>::SLOTS * W::TEAM * 4;
    const int first = (place.slot * W::TEAM + threadIdx.x % W::TEAM) * 4, end = place.active ? count : 0;
    const int steps = ceil_div(count, STEP);
    const u64 policy = evict_first();
    Turn<uint4> fetched(ring.rows[0][0]), used(ring.rows[0][0]);
    auto fetch = [&](int step) {
        if (const int entry = step * STEP + first; entry < end) {
            const Four<MIXED> four(list, entry, end, threshold);
#pragma unroll
            for (int r = 0; r < 4; r++) {
                fetch_row(fetched.row(r), weights + (u64)four.rows[r] * W::ROW_BYTES, four.wanted[r], policy);
                meta.fetch(r, four.rows[r], four.wanted[r]);
            }
        }
        close_fetches();
        fetched.next();
        meta.next_fetch();
    };
#pragma unroll 1
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        await_fetches<STAGES - 2>();
        fetch(step + STAGES - 1);
        const Four<MIXED> four(list, step * STEP + first, end, threshold);
        uint4 rows[4];
        u32 words[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            rows[r] = four.wanted[r] ? *used.row(r) : make_uint4(0, 0, 0, 0);
            words[r] = four.wanted[r] ? meta.read(r, four.rows[r]) : 0;
        }
        sums.add(rows, words, four.x);
        used.next();
        meta.next_use();
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
    for (int i = 0; i < W::COLUMNS / 4; i++)
        to[i] = make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
}

// Values 2 pair and 2 pair + 1 of the piece, added over the slots in their order, times unscale.
template <class W, int PIECE>
__device__ __forceinline__ float2 sum_of_slots(const float* slots, int pair, float unscale) {
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int s = 0; s < Place<W, PIECE>::SLOTS; s++) {
        const float2 part = ((const float2*)(slots + s * PIECE * W::COLUMNS))[pair];
        total.x += part.x, total.y += part.y;
    }
    return W::BITS == 4 ? make_float2(total.x * unscale, total.y * unscale) : total;
}
