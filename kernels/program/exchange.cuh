// How blocks hand each other vectors without a grid barrier, in the manner of NCCL's LL protocol.
//
// A word of 64 bits is an fp32 value and the epoch that it belongs to; it is written and read whole. A reader polls the
// word itself until the epoch is its own. So value and signal take one trip through L2, where a barrier takes one for
// the signal and another for the value.
//
//     word     bits 0..31 value, bits 32..63 epoch: launches * LAYERS + layer + 1
//
// Each word is written once a layer. That it is not overwritten while somebody still reads the last layer's value is
// what Turnstile sees to. Its two halves are far apart, so that nobody waits for it in practice.
#pragma once

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

// A pair of sums of all ranks that share the model, from that of this one. Of what o or down adds, each column is the
// business of one thread of each GPU.
//
//     peers[r]    words of rank r: [epoch's parity][o, down][from rank][HIDDEN]
//
// The others write into this rank's memory, so that value and signal take one trip over the link. A word is written
// again two layers later. By then all of this GPU's blocks have read it: the Turnstile between has let them pass, and the
// others have had sums that were sent after that. Sums run over the ranks in their order: all have the same bits.
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

// Until a word is there. For a block that has long to wait: it must not take bandwidth from those that work.
__device__ __forceinline__ void wait_idly(const u64* word, u32 epoch) {
    if (threadIdx.x == 0) {
        u64 a, b;
        do load_words(word, a, b);
        while ((u32)(a >> 32) != epoch);
    }
    __syncthreads();
}

// A barrier in two halves: enter() says that this block has read all of the layers before; pass() waits until all
// blocks have said so. The counter only grows, so that nothing is reset between launches.
struct Turnstile {
    u32* counter;

    __device__ void enter() const {  // behind a __syncthreads after the last read
        if (threadIdx.x == 0) add_release(counter);
    }

    __device__ void pass(u32 epoch) const {  // before a __syncthreads, behind which words may be sent
        if (threadIdx.x != 0) return;
        while ((int)(load_acquire(counter) - epoch * GRID) < 0) {
        }
    }
};
