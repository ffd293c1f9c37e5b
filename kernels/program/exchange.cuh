// How blocks hand each other vectors without a grid barrier, in the manner of NCCL's LL protocol.
//
// Values and the epoch that they belong to are written and read whole. A reader polls them until the epoch is its own.
// So value and signal take one trip through L2, where a barrier takes one for the signal and another for the value.
//
//     word     64 bits: 0..31 value, 32..63 epoch
//     four     128 bits: four values, whose lowest bits are the lowest four of the epoch
//
// A word may be left out in some layers. A four is written in every layer: the epoch before is known, so few bits do.
// They cost a value an ulp at most. That none is overwritten while somebody still reads the last layer's value is what
// Turnstile sees to. Its two halves are far apart, so that nobody waits for it in practice.
#pragma once

// Of a launch: one for the token's embedding, one for each layer. Fresh memory has 0, which none of the first 2^32 is.
__device__ __forceinline__ u32 first_epoch(u32 launches) { return launches * (LAYERS + 1) + 1; }

__device__ __forceinline__ u64 word_of(float x, u32 epoch) { return (u64)epoch << 32 | __float_as_uint(x); }
__device__ __forceinline__ float value_of(u64 word) { return __uint_as_float((u32)word); }
__device__ __forceinline__ bool are_of(u64 a, u64 b, u32 epoch) {
    return (u32)(a >> 32) == epoch && (u32)(b >> 32) == epoch;
}

__device__ __forceinline__ u32 marked(float x, u32 bit) { return (__float_as_uint(x) & ~1u) | (bit & 1); }
__device__ __forceinline__ float unmarked(u32 bits) { return __uint_as_float(bits & ~1u); }
__device__ __forceinline__ bool is_of(const uint4& four, u32 epoch) {
    return !(((four.x ^ epoch) | (four.y ^ epoch >> 1) | (four.z ^ epoch >> 2) | (four.w ^ epoch >> 3)) & 1);
}

__device__ __forceinline__ void send(u64* to, float first, float second, u32 epoch) {
    store_words(to, word_of(first, epoch), word_of(second, epoch));
}
__device__ __forceinline__ void send(uint4* to, const float4& x, u32 epoch) {
    store_four(to, make_uint4(marked(x.x, epoch), marked(x.y, epoch >> 1), marked(x.z, epoch >> 2),
                              marked(x.w, epoch >> 3)));
}

// Until those of COUNT items that has(i) are there. All loads are in flight before the first is looked at, and what is
// missing is asked for again. All lanes of a warp call it together.
template <int COUNT, class Has, class Ask, class IsThere>
__device__ __forceinline__ void poll(Has has, Ask ask, IsThere is_there) {
    u32 missing = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) missing |= has(i) ? 1u << i : 0u;
    __syncwarp();  // lanes that still have to send must not be kept waiting by those that poll
    while (missing) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (missing >> i & 1) ask(i);
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (is_there(i)) missing &= ~(1u << i);
    }
}

// COUNT pairs of words, at(i) for pair i where has(i).
template <int COUNT, class At, class Has>
__device__ __forceinline__ void receive(float2 (&pairs)[COUNT], u32 epoch, At at, Has has) {
    u64 a[COUNT] = {}, b[COUNT] = {};
    poll<COUNT>(
        has, [&](int i) { load_words(at(i), a[i], b[i]); }, [&](int i) { return are_of(a[i], b[i], epoch); });
#pragma unroll
    for (int i = 0; i < COUNT; i++) pairs[i] = make_float2(value_of(a[i]), value_of(b[i]));
}

// COUNT fours in the same way.
template <int COUNT, class At, class Has>
__device__ __forceinline__ void receive(float4 (&fours)[COUNT], u32 epoch, At at, Has has) {
    uint4 found[COUNT] = {};
    poll<COUNT>(
        has, [&](int i) { found[i] = load_four(at(i)); }, [&](int i) { return is_of(found[i], epoch); });
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        fours[i] = make_float4(unmarked(found[i].x), unmarked(found[i].y), unmarked(found[i].z), unmarked(found[i].w));
}

// The sums of four columns of all ranks that share the model, from those of this one. Of what o or down adds, each
// column is the business of one thread of each GPU.
//
//     peers[r]    words of rank r: [epoch's parity][o, down][from rank][HIDDEN]
//
// The others write into this rank's memory, so that value and signal take one trip over the link. All are sent before
// any is waited for. A word is written again two layers later, or in the next launch's first. By then it has been read:
// its writer has since waited for a later sum of its reader, one thread for all layers. Sums run over the ranks in
// their order: all have the same bits.
__device__ __forceinline__ float4 sum_of_ranks(u64* const* peers, int which, int column, const float4& own, u32 epoch) {
    const i64 at = (i64)((epoch & 1) * 2 + which) * RANKS * HIDDEN + column;
    const u64 a = word_of(own.x, epoch), b = word_of(own.y, epoch);
    const u64 c = word_of(own.z, epoch), d = word_of(own.w, epoch);
#pragma unroll 1
    for (int i = 1; i < RANKS; i++) {
        u64* const to = peers[(RANK + i) % RANKS] + at + RANK * HIDDEN;
        store_words_far(to, a, b), store_words_far(to + 2, c, d);
    }
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int rank = 0; rank < RANKS; rank++) {
        u64 x = a, y = b, z = c, w = d;
        if (const u64* const from = peers[RANK] + at + rank * HIDDEN; rank != RANK)
            do load_words_far(from, x, y), load_words_far(from + 2, z, w);
            while (!are_of(x, y, epoch) || !are_of(z, w, epoch));
        add_to(total, make_float4(value_of(x), value_of(y), value_of(z), value_of(w)));
    }
    return total;
}

// Until a four is there. For a block that has long to wait: it must not take bandwidth from those that work.
__device__ __forceinline__ void wait_idly(const uint4* four, u32 epoch) {
    if (threadIdx.x == 0)
        while (!is_of(load_four(four), epoch)) {
        }
    __syncthreads();
}

// A barrier in two halves. enter() says that this block has read all of the layers before; pass() waits until all
// blocks have. The counter only grows, so that nothing is reset between launches. What was read is in registers by
// then, and what is sent depends on the counter. So no fence is needed; it would cost 0.4 us of a layer (H200).
struct Turnstile {
    u32* counter;

    __device__ void enter() const {  // behind a __syncthreads after the last read
        if (threadIdx.x == 0) add_one(counter);
    }

    __device__ void pass(u32 layers) const {  // so many; before a __syncthreads, behind which words may be sent
        if (threadIdx.x != 0) return;
        while ((int)(load_counter(counter) - layers * GRID) < 0) {
        }
    }
};
