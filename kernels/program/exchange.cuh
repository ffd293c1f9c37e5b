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

// Of a launch: one for the token's embedding, one for each layer. None is 0, which fresh memory has.
__device__ __forceinline__ u32 first_epoch(u32 launches) { return launches * (LAYERS + 1) + 1; }

__device__ __forceinline__ void send(u64* to, float first, float second, u32 epoch) {
    const u64 a = (u64)epoch << 32 | __float_as_uint(first), b = (u64)epoch << 32 | __float_as_uint(second);
    store_words(to, a, b);
}

// COUNT pairs of words, at(i) for pair i where has(i): all loads are in flight before the first is looked at, and what
// is missing is asked for again. All lanes of a warp call it together.
template <int COUNT, class At, class Has>
__device__ __forceinline__ void receive(float2 (&pairs)[COUNT], u32 epoch, At at, Has has) {
    u64 a[COUNT] = {}, b[COUNT] = {};
    u32 missing = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) missing |= has(i) ? 1u << i : 0u;
    __syncwarp();  // lanes that still have to send must not be kept waiting by those that poll
    while (missing) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (missing >> i & 1) load_words(at(i), a[i], b[i]);
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if ((u32)(a[i] >> 32) == epoch && (u32)(b[i] >> 32) == epoch) missing &= ~(1u << i);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) pairs[i] = make_float2(__uint_as_float((u32)a[i]), __uint_as_float((u32)b[i]));
}

__device__ __forceinline__ u32 marked(float x, u32 bit) { return (__float_as_uint(x) & ~1u) | (bit & 1); }
__device__ __forceinline__ float unmarked(u32 bits) { return __uint_as_float(bits & ~1u); }

__device__ __forceinline__ void send(uint4* to, const float4& x, u32 epoch) {
    store_four(to, make_uint4(marked(x.x, epoch), marked(x.y, epoch >> 1), marked(x.z, epoch >> 2),
                              marked(x.w, epoch >> 3)));
}

__device__ __forceinline__ bool is_of(const uint4& four, u32 epoch) {
    return !(((four.x ^ epoch) | (four.y ^ epoch >> 1) | (four.z ^ epoch >> 2) | (four.w ^ epoch >> 3)) & 1);
}

// COUNT fours, as the pairs above.
template <int COUNT, class At, class Has>
__device__ __forceinline__ void receive(float4 (&fours)[COUNT], u32 epoch, At at, Has has) {
    uint4 found[COUNT] = {};
    u32 missing = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) missing |= has(i) ? 1u << i : 0u;
    __syncwarp();
    while (missing) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (missing >> i & 1) found[i] = load_four(at(i));
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (is_of(found[i], epoch)) missing &= ~(1u << i);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        fours[i] = make_float4(unmarked(found[i].x), unmarked(found[i].y), unmarked(found[i].z), unmarked(found[i].w));
}

// A pair of sums of all ranks that share the model, from that of this one. Of what o or down adds, each column is the
// business of one thread of each GPU.
//
//     peers[r]    words of rank r: [epoch's parity][o, down][from rank][HIDDEN]
//
// The others write into this rank's memory, so that value and signal take one trip over the link. A word is written
// again two layers later, or in the next launch's first. By then it has been read: its writer has since waited for a sum
// that its reader, one thread for all layers, sent after that. Sums run over the ranks in their order: all have the same
// bits.
__device__ __forceinline__ float2 sum_of_ranks(u64* const* peers, int which, int column, float2 own, u32 epoch) {
    const i64 at = (i64)((epoch & 1) * 2 + which) * RANKS * HIDDEN + column;
    const u64 a = (u64)epoch << 32 | __float_as_uint(own.x), b = (u64)epoch << 32 | __float_as_uint(own.y);
#pragma unroll 1
    for (int i = 1; i < RANKS; i++) store_words_far(peers[(RANK + i) % RANKS] + at + RANK * HIDDEN, a, b);
    float2 total = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (int rank = 0; rank < RANKS; rank++) {
        u64 x = a, y = b;
        if (rank != RANK)
            do load_words_far(peers[RANK] + at + rank * HIDDEN, x, y);
            while ((u32)(x >> 32) != epoch || (u32)(y >> 32) != epoch);
        total.x += __uint_as_float((u32)x), total.y += __uint_as_float((u32)y);
    }
    return total;
}

// Of four columns.
__device__ __forceinline__ float4 sum_of_ranks(u64* const* peers, int which, int column, const float4& own, u32 epoch) {
    const float2 low = sum_of_ranks(peers, which, column, make_float2(own.x, own.y), epoch);
    const float2 high = sum_of_ranks(peers, which, column + 2, make_float2(own.z, own.w), epoch);
    return make_float4(low.x, low.y, high.x, high.y);
}

// Until a four is there. For a block that has long to wait: it must not take bandwidth from those that work.
__device__ __forceinline__ void wait_idly(const uint4* four, u32 epoch) {
    if (threadIdx.x == 0)
        while (!is_of(load_four(four), epoch)) {
        }
    __syncthreads();
}

// A barrier in two halves: enter() says that this block has read all of the layers before; pass() waits until all
// blocks have said so. The counter only grows, so that nothing is reset between launches. What was read is in registers
// by then, and what is sent depends on the counter: no fence is needed, which would cost 0.4 us of a layer (H200).
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
