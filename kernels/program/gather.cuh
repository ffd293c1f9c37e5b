// The sum over a list of rows of value times row, for one granule a team: the part that reads the weights.
//
// A block's teams (formats.cuh) are spread over the granules of its piece of each row. What is left over them is spread
// over the list. A step is four rows a lane:
//
//     team      0 .. PIECE-1         PIECE .. 2 PIECE-1      ...
//     granule   0 .. PIECE-1         0 .. PIECE-1            ...
//     entries   slot 0               slot 1                  ... of the list, 4 TEAM of them to each slot a step
//
// Rows come by cp.async into a ring. So loads of the next steps are in flight during this one's arithmetic without
// holding registers. Weights leave L2 first: what blocks hand each other stays there.
//
// Four lanes of a granule want four rows of it. If each fetched its own, eight neighbouring lanes would ask for 32
// bytes of four rows. An H100 then reads at 1.7 TB/s instead of 2.9. So a warp shares out its 32 granules anew:
//
//     lane 8 c + j    fetches what lane 4 j + c multiplies: eight neighbouring lanes have 128 bytes of a row
//
// Integer instructions run at half the rate of floats on an H100, and 4-bit weights are unpacked by them. So the loop
// does little else: 200 instructions a step, where 357 took as long as memory. Scales of all channels are in shared
// memory by then (panel.cuh). Only the head, whose piece has too many groups, fetches a word beside each granule.
#pragma once

struct Ring {
    uint4 rows[STAGES][4][THREADS];
};

// Where a lane stands in a piece of PIECE granules. It is a member of the team that has granule and slot; its first
// entry of the list is first.
template <class W, int PIECE>
struct Place {
    static constexpr int SLOTS = W::TEAMS / PIECE, STEP = SLOTS * W::TEAM * 4;  // entries of all slots
    static constexpr bool SHARED = W::TEAM > 1;                                 // a warp's lanes fetch for each other
    static_assert(SLOTS > 0, "a piece has more granules than a block has teams");
    static_assert(W::TEAM == 1 || W::TEAM == 4, "seats of these are known");
    int slot, granule, first, seat;
    bool active;

    __device__ Place(int team, int member)
        : slot(team / PIECE), granule(team % PIECE), first((slot * W::TEAM + member) * 4), active(slot < SLOTS) {
        // of the warp's places in the ring; eight neighbouring lanes meet all banks, whichever way they are counted
        seat = SHARED ? (int)threadIdx.x / 32 * 32 + 8 * member + (team + 2 * member) % 8 : threadIdx.x;
    }

    // What this lane multiplies.
    __device__ static Place own() { return {(int)threadIdx.x / W::TEAM, (int)threadIdx.x % W::TEAM}; }
    // What it fetches.
    __device__ static Place fetched() {
        return SHARED ? Place(warp_of_block() * 8 + lane_of_warp() % 8, lane_of_warp() / 8) : own();
    }
};

// The rows to be read, multiples of four with zeros at the end, and what they are multiplied with.
struct List {
    const u16 *rows, *places;  // places: of their scales in a panel's row
    const float* values;
    int count;
    int first_group;  // of its channels, where groups lie along the input
};

// What a place reads: row 0 of its granule, and its group's meta words in a panel or from row 0 on. A row is wanted
// from limit on.
struct Part {
    const u8* weights;
    const u32* meta;
    bool active;
    float limit;
};

// part_of: the Part of a Place. MIXED: parts have limits. HAS_SCALES: meta is in a panel; otherwise its words travel
// through ring_words, unless groups lie along the input: those want none before the end. META_STRIDE: words from a row
// to the next. meanwhile: called while the first rows are on their way; it may ask for more, and closes no fetches.
template <class W, int PIECE, bool MIXED, bool HAS_SCALES, int META_STRIDE = W::GROUPS, class PartOf,
          class Meanwhile>
__device__ __forceinline__ void gather(SumsOf<W>& sums, PartOf part_of, const List& list, Ring& ring,
                                       u32* ring_words, Meanwhile meanwhile) {
    using Places = Place<W, PIECE>;
    constexpr int STAGE = 4 * THREADS, TURN = STAGES * STAGE;
    constexpr bool FETCHES_META = !HAS_SCALES && W::BITS < 16 && !W::BY_INPUT;
    static_assert(!W::BY_INPUT || (W::BITS == 4 && PIECE % 8 == 0), "a warp's granules have one slot");
    const Places own = Places::own(), fetched = Places::fetched();
    const Part part = part_of(own), from = part_of(fetched);
    // By input a lane's x is for all of its warp's granules, so also where its own is beyond the last.
    const int end = own.active && (W::BY_INPUT || part.active) ? list.count : 0;
    const int fetched_end = fetched.active && from.active ? list.count : 0;
    const int own_group = W::BY_INPUT ? list.first_group + lane_of_warp() / 4 : 0;  // B's column of this lane
    const u64 policy = evict_first();
    const uint4* const my_rows = &ring.rows[0][0][own.seat];
    uint4* const to = &ring.rows[0][0][fetched.seat];
    u32* const my_meta = ring_words + threadIdx.x;
    auto fetch = [&](int step, int turn) {  // step: the first entry of all slots
        if (const int entry = step + fetched.first; entry < fetched_end) {
            u32 rows[4];
            float x[4];
            read_four(rows, list.rows + entry);
            if (MIXED) read_four(x, list.values + entry);
#pragma unroll
            for (int r = 0; r < 4; r++)  // whole lines are 3% faster for 4 bits only
                fetch_row<W::BITS == 4>(to + turn + r * THREADS, from.weights + (u64)rows[r] * W::ROW_BYTES,
                                        !MIXED || is_kept(x[r], from.limit), policy);
        }
        if (const int entry = step + own.first; FETCHES_META && entry < end) {
            u32 rows[4];
            read_four(rows, list.rows + entry);
#pragma unroll
            for (int r = 0; r < 4; r++)
                fetch_word(my_meta + turn + r * THREADS, part.meta + (u64)rows[r] * META_STRIDE, true);
        }
        close_fetches();
    };
#pragma unroll 1
    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage * Places::STEP, stage * STAGE);
    meanwhile();
    int used = 0, free = (STAGES - 1) * STAGE;
#pragma unroll 1
    for (int step = 0; step < list.count; step += Places::STEP) {
        await_fetches<STAGES - 2>();
        if (Places::SHARED) __syncwarp();  // all have arrived, and nobody still reads what is fetched into next
        fetch(step + (STAGES - 1) * Places::STEP, free);
        const int entry = step + own.first;
        const bool live = entry < end;
        float x[4] = {};
        u32 places[4] = {}, channels[4] = {}, factors[4];
        if (live) read_four(x, list.values + entry);
        if (live && W::BY_INPUT) read_four(channels, list.rows + entry);
        if (live && HAS_SCALES) read_four(places, list.places + entry);
        uint4 rows[4];
#pragma unroll
        for (int r = 0; r < 4; r++) {
            rows[r] = my_rows[used + r * THREADS];
            u32 meta = 0;
            if (HAS_SCALES)
                meta = part.meta[places[r] * META_STRIDE];
            else if (live && FETCHES_META)
                meta = my_meta[used + r * THREADS];
            float factor = !MIXED || is_kept(x[r], part.limit) ? x[r] : 0.0f;
            if (W::BY_INPUT && (int)channels[r] / W::GROUP_CHANNELS != own_group) factor = 0.0f;
            factors[r] = W::word(factor, meta);
        }
        if (W::BITS == 4 || live) sums.add(rows, factors);  // where not live, 4 bits meet factors of 0
        free = used;
        used = used + STAGE == TURN ? 0 : used + STAGE;
    }
}

// Four values, number four of granule, in a slot of PIECE * COLUMNS floats. Turned about with the granule for 4 bits,
// whose eight lanes that store would all meet the same banks.
template <class W>
__device__ __forceinline__ int place_in_slot(int granule, int four) {
    return granule * (W::COLUMNS / 4) + (W::BITS == 4 ? four ^ (granule & 7) : four);
}

// Put the sums of all slots side by side, [SLOTS][PIECE * COLUMNS]. The ring must be free: it may lie there, too.
template <class W, int PIECE>
__device__ __forceinline__ void lay_out(SumsOf<W>& sums, float* slots) {
    const auto place = Place<W, PIECE>::own();
    float out[W::COLUMNS];
    if (!sums.finish(out) || !place.active) return;
    float4* const to = (float4*)(slots + place.slot * PIECE * W::COLUMNS);
#pragma unroll
    for (int i = 0; i < W::COLUMNS / 4; i++) {
        const float4 four = make_float4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
        to[place_in_slot<W>(place.granule, i)] = four;
    }
}

// The same of groups along the input, from first_group on. words: of this lane's granule in it, of panel P.
template <class P, int PIECE>
__device__ __forceinline__ void lay_out_groups(SumsOf<typename P::W>& sums, const u32* words, int first_group,
                                               float* slots) {
    using W = typename P::W;
    static_assert(P::GROUPS <= 8, "B has eight columns");
    const auto place = Place<W, PIECE>::own();
    const int first = 2 * (lane_of_warp() & 3);
    float out[8];
    const int groups = ceil_div(W::K, W::GROUP_CHANNELS) - first_group;  // a panel has zeros beyond the last
    sums.finish_groups(out, words, P::STRIDE, P::EXISTS ? P::GROUPS : min_of(P::GROUPS, groups));
    if (!place.active) return;
    float4* const to = (float4*)(slots + place.slot * PIECE * W::COLUMNS);
    to[place_in_slot<W>(place.granule, first)] = make_float4(out[0], out[1], out[2], out[3]);
    to[place_in_slot<W>(place.granule, first + 1)] = make_float4(out[4], out[5], out[6], out[7]);
}

// Whichever of the two a product with panel P wants. part_of: gather's.
template <class P, int PIECE, class PartOf>
__device__ __forceinline__ void lay_out_sums(SumsOf<typename P::W>& sums, PartOf part_of, int first_group,
                                             float* slots) {
    using W = typename P::W;
    if constexpr (W::BY_INPUT)
        lay_out_groups<P, PIECE>(sums, part_of(Place<W, PIECE>::own()).meta, first_group, slots);
    else
        lay_out<W, PIECE>(sums, slots);
}

// Values 4 four ... of the piece, added over slots first, first + step ... in their order, times unscale.
template <class W, int PIECE>
__device__ __forceinline__ float4 sum_of_slots(const float* slots, int four, float unscale, int first = 0,
                                               int step = 1) {
    constexpr int OF_GRANULE = W::COLUMNS / 4;
    const float4* const own = (const float4*)slots + place_in_slot<W>(four / OF_GRANULE, four % OF_GRANULE);
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int s = first; s < Place<W, PIECE>::SLOTS; s += step) add_to(total, own[s * PIECE * OF_GRANULE]);
    return W::BITS == 4 ? times(total, unscale) : total;
}
