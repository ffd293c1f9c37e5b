// Every instruction that CUDA C++ has no word for, under a name that says what it does.
//
// Nothing else in this folder is assembly. A test replaces this one file and runs the rest on a CPU.
#ifndef PTX_CUH
#define PTX_CUH

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

__device__ __forceinline__ u8* shared_memory() {
    extern __shared__ __align__(16) u8 memory[];
    return memory;
}

__device__ __forceinline__ u16 bf16_bits(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ u16 fp16_bits(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ float from_fp16(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
// Two bf16 or fp16, low in the lower half.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ u32 fp16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// fp16 of two nibbles, one in each half: 1024 + n of bits 0 to 3, and 1024 + 16 n of bits 4 to 7.
__device__ __forceinline__ u32 low_nibbles(u32 x) {
    u32 pair;
    asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(pair) : "r"(x));
    return pair;
}
__device__ __forceinline__ u32 high_nibbles(u32 x) {
    u32 pair;
    asm("lop3.b32 %0, %1, 0x00f000f0, 0x64006400, 0xea;" : "=r"(pair) : "r"(x));
    return pair;
}

// d += a b on tensor cores: a [16, 16] and b [16, 8] in fp16 or bf16, d [16, 8] in fp32, spread over a warp. Lane
// 4 g + c has
//     a  rows g, g + 8, g, g + 8 at depths 2 c (+1), 2 c (+1), 2 c + 8 (+1), 2 c + 8 (+1)
//     b  column g at depths 2 c (+1), 2 c + 8 (+1)
//     d  row g, columns 2 c and 2 c + 1; row g + 8, the same
template <bool BF16>
__device__ __forceinline__ void multiply_add(float* d, const u32 (&a)[4], const u32 (&b)[2]) {
    if (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Words that other blocks read or have written: each u64 is whole, and L1 is passed by.
__device__ __forceinline__ void store_words(u64* to, u64 a, u64 b) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(a), "l"(b) : "memory");
}
__device__ __forceinline__ void load_words(const u64* from, u64& a, u64& b) {
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
}
// 16 bytes, whole as well.
__device__ __forceinline__ void store_four(uint4* to, uint4 x) {
    const u64 low = (u64)x.y << 32 | x.x, high = (u64)x.w << 32 | x.z;
    asm volatile("{.reg .b128 x; mov.b128 x, {%1, %2}; st.relaxed.gpu.global.b128 [%0], x;}" ::"l"(to), "l"(low),
                 "l"(high)
                 : "memory");
}
__device__ __forceinline__ uint4 load_four(const uint4* from) {
    u64 low, high;
    asm volatile("{.reg .b128 x; ld.relaxed.gpu.global.b128 x, [%2]; mov.b128 {%0, %1}, x;}"
                 : "=l"(low), "=l"(high)
                 : "l"(from)
                 : "memory");
    return make_uint4((u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32));
}
// The same as words where the other side is another GPU.
__device__ __forceinline__ void store_words_far(u64* to, u64 a, u64 b) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(a), "l"(b) : "memory");
}
__device__ __forceinline__ void load_words_far(const u64* from, u64& a, u64& b) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(from) : "memory");
}
__device__ __forceinline__ void add_one(u32* counter) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ u32 load_counter(const u32* counter) {
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// A cache policy of what is read once: it leaves L2 first.
__device__ __forceinline__ u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint4 read_once(const u8* from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from), "l"(evict_first()));
    return x;
}
__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
// Copies into shared memory that go on by themselves: 16 or 4 bytes, or zeros where not wanted. WHOLE_LINE: L2 fetches
// the 128 bytes around at once.
template <bool WHOLE_LINE>
__device__ __forceinline__ void fetch_row(uint4* to, const u8* from, bool wanted, u64 policy) {
    const u32 address = (u32)__cvta_generic_to_shared(to), bytes = wanted ? 16 : 0;
    if (WHOLE_LINE)
        asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(address),
                     "l"(from), "r"(bytes), "l"(policy));
    else
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address), "l"(from),
                     "r"(bytes), "l"(policy));
}
__device__ __forceinline__ void fetch_word(u32* to, const u32* from, bool wanted) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(wanted ? 4 : 0));
}
__device__ __forceinline__ void close_fetches() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most OPEN of the groups that were closed are under way.
template <int OPEN>
__device__ __forceinline__ void await_fetches() {
    asm volatile("cp.async.wait_group %0;" ::"n"(OPEN) : "memory");
}

#endif
