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
// Integer instructions run at half the rate of floats on an H100, and 4-bit weights are unpacked by them. So the loop
// does little else: 180 instructions a step, where 357 took as long as memory. A list's "words" are value and scale
// already multiplied (formats.cuh), a row of words for each group of the piece. Whoever makes the list has the scales
// of all channels in shared memory (panels, shared.cuh). Only the head, whose piece has too many groups, fetches a word
// beside each granule.
#pragma once

struct Ring {
    uint4 rows[STAGES][4][THREADS];
};

struct List {
    const u16* rows;
    const u32* words;  // of this thread's group; 0 where a row is not wanted
    int count;
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

// weights: row 0 of this thread's granule. MIXED: of the list's rows some are not wanted. HAS_SCALES: the list's words
// have them. Otherwise meta is the word of this thread's group in row 0, META_STRIDE words from a row to the next, and
// these travel through ring_words.
template <class W, int PIECE, bool MIXED, bool HAS_SCALES, int META_STRIDE = W::GROUPS>
__device__ __forceinline__ void gather(Sums<W::BITS>& sums, const u8* weights, const u32* meta,
                                       const Place<W, PIECE>& place, const List& list, Ring& ring, u32* ring_words) {
    constexpr int STAGE = 4 * THREADS, TURN = STAGES * STAGE, STEP = Place<W, PIECE>::SLOTS * W::TEAM * 4;
    constexpr bool FETCHES_META = !HAS_SCALES && W::BITS < 16;
    const int end = place.active ? list.count : 0, own = (place.slot * W::TEAM + threadIdx.x % W::TEAM) * 4;
    const u64 policy = evict_first();
    uint4* const my_rows = &ring.rows[0][0][threadIdx.x];
    u32* const my_meta = ring_words + threadIdx.x;
    auto fetch = [&](int entry, int turn) {
        if (entry < end) {
            const ushort4 of_list = *(const ushort4*)(list.rows + entry);
            const u32 rows[4] = {of_list.x, of_list.y, of_list.z, of_list.w};
            bool wanted[4] = {true, true, true, true};
            if (MIXED) {
                const uint4 w = *(const uint4*)(list.words + entry);
                wanted[0] = w.x != 0, wanted[1] = w.y != 0, wanted[2] = w.z != 0, wanted[3] = w.w != 0;
            }
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const u8* const from = weights + (u64)rows[r] * W::ROW_BYTES;
                fetch_row<W::BITS == 4>(my_rows + turn + r * THREADS, from, wanted[r], policy);  // 3% faster for 4 only
                if (FETCHES_META)
                    fetch_word(my_meta + turn + r * THREADS, meta + (u64)rows[r] * META_STRIDE, wanted[r]);
            }
        }
        close_fetches();
    };
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; stage++) fetch(own + stage * STEP, stage * STAGE);
    int used = 0, free = (STAGES - 1) * STAGE;
#pragma unroll 1
    for (int entry = own; entry - own < list.count; entry += STEP) {
        await_fetches<STAGES - 2>();
        fetch(entry + (STAGES - 1) * STEP, free);
        const bool live = entry < end;
        const uint4 w = live ? *(const uint4*)(list.words + entry) : make_uint4(0, 0, 0, 0);
        u32 factors[4] = {w.x, w.y, w.z, w.w};
        uint4 rows[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            rows[r] = my_rows[used + r * THREADS];
            if (FETCHES_META) factors[r] = W::word(__uint_as_float(factors[r]), live ? my_meta[used + r * THREADS] : 0);
        }
        if (W::BITS == 4 || live) sums.add(rows, factors);  // where not live, 4 bits meet factors of 0
        free = used;
        used = used + STAGE == TURN ? 0 : used + STAGE;
    }
    await_fetches<0>();
}

// Four values, number four of granule, in a slot of PIECE * COLUMNS floats. Turned about with the granule for 4 bits,
// whose eight lanes that store would all meet the same banks.
template <class W>
__device__ __forceinline__ int place_in_slot(int granule, int four) {
    return granule * (W::COLUMNS / 4) + (W::BITS == 4 ? four ^ (granule & 7) : four);
}

// Put the sums of all slots side by side, [SLOTS][PIECE * COLUMNS]. The ring must be free: it may lie there, too.
template <class W, int PIECE>
__device__ __forceinline__ void lay_out(Sums<W::BITS>& sums, const Place<W, PIECE>& place, float* slots) {
    float out[W::COLUMNS];
    if (!sums.finish(out) || !place.active) return;
    float4* const to = (float4*)(slots + place.slot * PIECE * W::COLUMNS);
#pragma unroll
    for (int i = 0; i < W::COLUMNS / 4; i++) {
        const float4 four = make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
        to[place_in_slot<W>(place.granule, i)] = four;
    }
}

// Values 2 pair and 2 pair + 1 of the piece, added over slots first, first + step ... in their order, times unscale.
template <class W, int PIECE>
__device__ __forceinline__ float2 sum_of_slots(const float* slots, int pair, float unscale, int first = 0,
                                               int step = 1) {
    const int at = 2 * place_in_slot<W>(2 * pair / W::COLUMNS, pair % (W::COLUMNS / 2) / 2) + pair % 2;
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 4
    for (int s = first; s < Place<W, PIECE>::SLOTS; s += step) {
        const float2 part = ((const float2*)(slots + s * PIECE * W::COLUMNS))[at];
        total.x += part.x, total.y += part.y;
    }
    return W::BITS == 4 ? make_float2(total.x * unscale, total.y * unscale) : total;
}
