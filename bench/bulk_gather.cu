// The sparse GEMV of kernels/sparse_gemv.py for one bf16 row, in CUDA C++ with what Triton 3.6 cannot say: one warp asks
// the copy engine for whole pieces of kept weight rows (cp.async.bulk) and the others sum them out of shared memory, so
// that the bytes in flight are bounded by shared memory and not by registers. bench/bulk_gather.py builds and times it.
//
// A program owns every SPLITS-th group of 16 channels and BLOCK_N columns, as there. Compiled with BLOCK_N, ROWS (weight
// rows to a stage), STAGES, SPLITS and K given; N must be a multiple of BLOCK_N.

#include <cuda_runtime.h>

constexpr int GROUP = 16;
constexpr int OWNED = ((K + GROUP - 1) / GROUP + SPLITS - 1) / SPLITS * GROUP;
constexpr int CONSUMERS = BLOCK_N / 8;  // threads: each sums 8 columns, 16 bytes of every row
constexpr int THREADS = CONSUMERS + 32;
constexpr int ROW_BYTES = BLOCK_N * 2;

struct Shared {
    alignas(128) uint4 rows[STAGES][ROWS][CONSUMERS];
    float value[OWNED + ROWS];
    int index[OWNED + ROWS];
    int kept_by_warp[THREADS / 32];
    alignas(8) unsigned long long full[STAGES], empty[STAGES];
};

__device__ unsigned address(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }

__device__ void init_barrier(unsigned long long* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals));
}

__device__ void arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ void expect(unsigned long long* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}

__device__ void wait(unsigned long long* barrier, int parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(address(barrier)), "r"(parity) : "memory");
}

__device__ void copy(void* to, const void* from, int bytes, unsigned long long* barrier, unsigned long long policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            address(to)), "l"(from), "r"(bytes), "r"(address(barrier)), "l"(policy) : "memory");
}

__device__ float as_float(unsigned bits) { return __uint_as_float(bits); }

// List the owned channels with |x| >= threshold (a NaN is) in order of channel; returns how many there are.
__device__ int compact(Shared& s, const unsigned short* x, float threshold) {
    int count = 0, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int base = 0; base < OWNED; base += THREADS) {
        int r = base + threadIdx.x;
        int channel = (r / GROUP * SPLITS + blockIdx.y) * GROUP + r % GROUP;
        bool owned = r < OWNED && channel < K;
        float value = owned ? as_float((unsigned)x[channel] << 16) : 0.0f;
        bool kept = owned && !(fabsf(value) < threshold);
        unsigned kept_lanes = __ballot_sync(0xffffffff, kept);
        if (lane == 0) s.kept_by_warp[warp] = __popc(kept_lanes);
        __syncthreads();
        int position = count + __popc(kept_lanes & ((1u << lane) - 1));
        for (int i = 0; i < THREADS / 32; i++) {
            if (i < warp) position += s.kept_by_warp[i];
            count += s.kept_by_warp[i];
        }
        if (kept) {
            s.index[position] = channel;
            s.value[position] = value;
        }
        __syncthreads();
    }
    return count;
}

__device__ void produce(Shared& s, const unsigned short* weight, long long stride, int start, int count) {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    int lane = threadIdx.x % 32;
    for (int stage = 0; stage * ROWS < count; stage++) {
        int slot = stage % STAGES, rows = min(ROWS, count - stage * ROWS);
        if (lane == 0) {
            wait(&s.empty[slot], (stage / STAGES & 1) ^ 1);
            expect(&s.full[slot], rows * ROW_BYTES);
        }
        __syncwarp();
        if (lane < rows)
            copy(s.rows[slot][lane], weight + s.index[stage * ROWS + lane] * stride + start, ROW_BYTES, &s.full[slot], policy);
    }
}

__device__ void consume(Shared& s, float* partial, int count) {
    float total[8] = {};
    for (int stage = 0; stage * ROWS < count; stage++) {
        int slot = stage % STAGES, rows = min(ROWS, count - stage * ROWS);
        wait(&s.full[slot], stage / STAGES & 1);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            if (row >= rows) break;
            uint4 eight = s.rows[slot][row][threadIdx.x];
            float value = s.value[stage * ROWS + row];
            unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                total[2 * i] += value * as_float(pairs[i] << 16);
                total[2 * i + 1] += value * as_float(pairs[i] & 0xffff0000);
            }
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(&s.empty[slot]);
    }
    float4* out = (float4*)(partial + threadIdx.x * 8);
    out[0] = make_float4(total[0], total[1], total[2], total[3]);
    out[1] = make_float4(total[4], total[5], total[6], total[7]);
}

__global__ void __launch_bounds__(THREADS) bulk_gather(
    const unsigned short* x, const unsigned short* weight, long long stride, const float* threshold, float* partials, int N) {
    extern __shared__ __align__(128) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(&s.full[i], 1);
            init_barrier(&s.empty[i], CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    float limit = *threshold;
    cudaGridDependencySynchronize();
    int count = compact(s, x, limit);  // ends with a barrier, so every thread sees the barriers set up
    int start = blockIdx.x * BLOCK_N;
    if (threadIdx.x >= CONSUMERS) {
        produce(s, weight, stride, start, count);
        cudaTriggerProgrammaticLaunchCompletion();
    } else {
        consume(s, partials + (long long)blockIdx.y * N + start, count);
    }
}

// Launch on stream, programmatically dependent on the kernel before. Returns CUDA's error, 0 if none.
extern "C" int launch(
    void* stream, const void* x, const void* weight, long long stride, const void* threshold, void* partials, int N) {
    static cudaError_t ready =
        cudaFuncSetAttribute(bulk_gather, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
    if (ready != cudaSuccess) return ready;
    cudaLaunchAttribute dependent{};
    dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(N / BLOCK_N, SPLITS);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = sizeof(Shared);
    config.stream = (cudaStream_t)stream;
    config.attrs = &dependent;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(
        &config, bulk_gather, (const unsigned short*)x, (const unsigned short*)weight, stride, (const float*)threshold,
        (float*)partials, N);
}
