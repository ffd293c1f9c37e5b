// Runs kernels/program on a CPU: in place of ptx.cuh, and of what CUDA gives a kernel. Slow, exact, and deterministic.
//
// Every thread of every block is a fiber; one OS thread takes them in turn. A fiber gives way where it waits: at a
// barrier, in a shuffle, and while it polls a word. Fibers run in random order, some oftener than others. Copies into
// shared memory happen at once or as late as they may. So a missing barrier or wait gives other results.
#define PTX_CUH

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) ushort4 { u16 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

template <class To, class From>
To as(From x) {
    To y;
    static_assert(sizeof(x) == sizeof(y));
    memcpy(&y, &x, sizeof(x));
    return y;
}
inline float __uint_as_float(u32 x) { return as<float>(x); }
inline u32 __float_as_uint(float x) { return as<u32>(x); }
inline float __int_as_float(int x) { return as<float>(x); }
inline int __float_as_int(float x) { return as<int>(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
    const u64 bytes = (u64)high << 32 | low;
    u32 out = 0;
    for (int i = 0; i < 4; i++) out |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return out;
}
inline i64 clock64() {
    static i64 ticks = 0;
    return ++ticks;
}

#include "config.cuh"

struct Barrier {
    int expected = 0, arrived = 0, generation = 0;
};
struct Warp {
    Barrier barrier;
    u32 values[2][32][8];
};
struct Block {
    Barrier barrier;
    std::unique_ptr<u8[]> memory{new u8[SHARED_BYTES + 16]};
    Warp warps[THREADS / 32];
};
struct Index { u32 x; };
struct Copy {
    void* to;
    const void* from;  // null: zeros
    int bytes, group;
};
struct Fiber {
    ucontext_t context;  // to begin with; a swapcontext is two system calls, a jump is none
    jmp_buf resume;
    std::unique_ptr<u8[]> stack;
    Block* block;
    Index thread, place;
    bool begun = false, ended = false;
    int closed = 0;  // groups of copies
    std::deque<Copy> copies;
};
static bool late;  // whether copies wait until they are awaited
static const char* fault;  // of the launch so far, that a GPU would not forgive
static std::vector<Fiber> fibers;
static Fiber* current;
static jmp_buf scheduler;
#define threadIdx (current->thread)
#define blockIdx (current->place)

inline void give_way() {
    if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}
inline void take_turn(Fiber& fiber) {  // until it gives way
    current = &fiber;
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.resume, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}
inline void meet(Barrier& barrier) {
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        barrier.generation++;
    }
    while (barrier.generation == generation) give_way();
}
inline Warp& own_warp() { return current->block->warps[threadIdx.x / 32]; }
inline void __syncthreads() { meet(current->block->barrier); }
inline void __syncwarp() { meet(own_warp().barrier); }

template <class T>
T from_lane(T x, int lane) {
    Warp& warp = own_warp();
    auto& values = warp.values[warp.barrier.generation & 1];
    values[threadIdx.x % 32][0] = as<u32>(x);
    meet(warp.barrier);
    return as<T>(values[lane][0]);
}
template <class T>
T __shfl_xor_sync(u32, T x, int distance) { return from_lane(x, (threadIdx.x % 32) ^ distance); }
template <class T>
T __shfl_sync(u32, T x, int lane) { return from_lane(x, lane); }

inline u32 __ballot_sync(u32, u32 x) {
    u32 votes = 0;
    Warp& warp = own_warp();
    auto& values = warp.values[warp.barrier.generation & 1];
    values[threadIdx.x % 32][0] = x;
    meet(warp.barrier);
    for (int lane = 0; lane < 32; lane++) votes |= (values[lane][0] ? 1u : 0u) << lane;
    return votes;
}
inline u32 __reduce_max_sync(u32, u32 x) {
    for (int distance = 16; distance; distance >>= 1) x = std::max(x, __shfl_xor_sync(0, x, distance));
    return x;
}

inline u8* shared_memory() { return (u8*)(((uintptr_t)current->block->memory.get() + 15) / 16 * 16); }
inline u16 bf16_bits(float x) {
    const u32 bits = as<u32>(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u16 fp16_bits(float x) { return as<u16>((_Float16)x); }
inline float from_fp16(u16 bits) { return (float)as<_Float16>(bits); }
inline u32 bf16_pair(float low, float high) { return bf16_bits(low) | (u32)bf16_bits(high) << 16; }
inline u32 fp16_pair(float low, float high) { return fp16_bits(low) | (u32)fp16_bits(high) << 16; }
inline u32 low_nibbles(u32 x) { return (x & 0x000f000f) | 0x64006400; }
inline u32 high_nibbles(u32 x) { return (x & 0x00f000f0) | 0x64006400; }

template <bool BF16>
inline void multiply_add(float* d, const u32 (&a)[4], const u32 (&b)[2]) {
    Warp& warp = own_warp();
    auto& values = warp.values[warp.barrier.generation & 1];
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    memcpy(values[lane], a, 16);
    memcpy(values[lane] + 4, b, 8);
    meet(warp.barrier);
    auto half = [](u32 pair, int k) {
        const u16 bits = k % 2 ? pair >> 16 : pair;
        return BF16 ? as<float>((u32)bits << 16) : from_fp16(bits);
    };
    for (int i = 0; i < 4; i++) {
        const int column = 2 * c + i % 2;
        for (int k = 0; k < 16; k++) {
            const float x = half(values[4 * g + k % 8 / 2][i / 2 + k / 8 * 2], k);
            d[i] += x * half(values[4 * column + k % 8 / 2][4 + k / 8], k);
        }
    }
}

inline void store_words(u64* to, u64 a, u64 b) { to[0] = a, to[1] = b; }
inline void load_words(const u64* from, u64& a, u64& b) {
    a = from[0], b = from[1];
    give_way();
}
inline void store_words_far(u64* to, u64 a, u64 b) { store_words(to, a, b); }
inline void load_words_far(const u64* from, u64& a, u64& b) { load_words(from, a, b); }
inline void store_four(uint4* to, uint4 x) { *to = x; }
inline uint4 load_four(const uint4* from) {
    const uint4 x = *from;
    give_way();
    return x;
}
inline void add_one(u32* counter) { ++*counter; }
inline u32 load_counter(const u32* counter) {
    give_way();
    return *(volatile const u32*)counter;
}
inline u64 evict_first() { return 0; }
inline uint4 read_once(const u8* from) { return *(const uint4*)from; }
inline void prefetch(const void*) {}
inline void carry_out(const Copy& copy) {
    if (copy.from)
        memcpy(copy.to, copy.from, copy.bytes);
    else
        memset(copy.to, 0, copy.bytes);
}
inline void fetch(void* to, const void* from, int bytes) {
    const Copy copy{to, from, bytes, current->closed};
    if (late)
        current->copies.push_back(copy);
    else
        carry_out(copy);
}
template <bool WHOLE_LINE>
inline void fetch_row(uint4* to, const u8* from, bool wanted, u64) {
    if (((uintptr_t)to | (wanted ? (uintptr_t)from : 0)) % 16) fault = "16 bytes are copied from or to odd addresses";
    fetch(to, wanted ? from : nullptr, 16);
}
inline void fetch_word(u32* to, const u32* from, bool wanted) { fetch(to, wanted ? from : nullptr, 4); }
inline void close_fetches() { current->closed++; }
template <int OPEN>
void await_fetches() {
    auto& copies = current->copies;
    for (; !copies.empty() && copies.front().group < current->closed - OPEN; copies.pop_front())
        carry_out(copies.front());
}

#include "program.cu"

static const Arguments* arguments;

static u64 random_below(u64 limit) {  // xorshift
    static u64 state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % limit;
}

static void enter() {
    decode_step(*arguments);
    current->ended = true;
    give_way();
}

// A launch, with program.cu's Arguments. Returns what a GPU would not do, or null. A round in which nothing ends is no
// proof of a deadlock, but a hundred million are.
extern "C" const char* launch(const Arguments* given) {
    static int launches = 0;
    fault = nullptr;
    late = launches++ % 2 == 0;
    arguments = given;
    std::vector<Block> blocks(GRID);
    fibers.clear();
    fibers.resize(GRID * THREADS);
    for (int i = 0; i < GRID * THREADS; i++) {
        Fiber& fiber = fibers[i];
        fiber.block = &blocks[i / THREADS];
        fiber.place.x = i / THREADS, fiber.thread.x = i % THREADS;
        memset(fiber.block->memory.get(), 0xff, i % THREADS ? 0 : SHARED_BYTES);  // NaN
        fiber.block->barrier.expected = THREADS;
        for (Warp& warp : fiber.block->warps) warp.barrier.expected = 32;
        fiber.stack.reset(new u8[1 << 16]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = 1 << 16;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<int> order(fibers.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    size_t left = fibers.size();
    for (long turn = 0; left; turn++) {
        if (turn > 100000000 / (long)fibers.size()) return "the blocks wait for each other for ever";
        for (size_t i = order.size() - 1; i; i--) std::swap(order[i], order[random_below(i + 1)]);
        const bool all = random_below(4) == 0;
        for (int i : order) {
            Fiber& fiber = fibers[i];
            if (fiber.ended || (!all && random_below(3) == 0)) continue;
            take_turn(fiber);
            left -= fiber.ended;
        }
    }
    return fault;
}
