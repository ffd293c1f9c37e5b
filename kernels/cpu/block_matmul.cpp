// Products of bf16 with many rows and weights in blocks, where the processor multiplies bf16. Half a strip's columns
// become bf16, so many channels at a time that they stay in L2 while all rows meet them. The matrix registers of amx.h
// multiply where there are any. block_linear.py has the op.
// A column's sum has the same bits in any thread, and a row's beside any others.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "amx.h"
#include "half_strips.h"
#include "tensors.h"

#if defined(__AVX512BF16__)
namespace teal {
namespace {

constexpr int64_t TILE_CHANNELS = 512;  // in a tile of 64 KB

// sums [rows][64] += x [rows, stride] times a tile [pairs][64][2].
template <int COUNT>
void multiply(const BFloat16* x, int64_t stride, const BFloat16* tile, int64_t pairs, float* sums) {
  __m512 found[COUNT][VECTORS];
  for (int r = 0; r < COUNT; ++r)
    for (int v = 0; v < VECTORS; ++v) found[r][v] = _mm512_loadu_ps(sums + r * HALF_STRIP + v * LANES);
  for (int64_t p = 0; p < pairs; ++p, tile += 2 * HALF_STRIP) {
    __m512bh weights[VECTORS];
    std::memcpy(weights, tile, sizeof(weights));
    for (int r = 0; r < COUNT; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * stride + 2 * p, sizeof(pair));
      const auto entries = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      for (int v = 0; v < VECTORS; ++v) found[r][v] = _mm512_dpbf16_ps(found[r][v], entries, weights[v]);
    }
  }
  for (int r = 0; r < COUNT; ++r)
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(sums + r * HALF_STRIP + v * LANES, found[r][v]);
}

// As multiply, for so many rows, COUNT at once.
template <int COUNT>
void multiply_rows(const BFloat16* x, int64_t rows, int64_t stride, const BFloat16* tile, int64_t pairs, float* sums) {
  for (; rows >= COUNT; rows -= COUNT, x += COUNT * stride, sums += COUNT * HALF_STRIP)
    multiply<COUNT>(x, stride, tile, pairs, sums);
  if constexpr (COUNT > 1) multiply_rows<COUNT - 1>(x, rows, stride, tile, pairs, sums);
}

// All rows of x, by the registers that every such processor has.
class VectorRows {
 public:
  struct Scope {};

  VectorRows(const BFloat16* x, int64_t rows, int64_t stride) : x(x), rows(rows), stride(stride) {}
  int64_t padded() const { return rows; }

  // sums [rows][64] += rows times a tile [pairs][64][2] of the channels from k on.
  void multiply(int64_t k, const BFloat16* tile, int64_t pairs, float* sums) const {
    multiply_rows<ROWS>(x + k, rows, stride, tile, pairs, sums);
  }

 private:
  const BFloat16* x;
  int64_t rows, stride;
};

// Columns of a weight from begin on, half a strip at most, into count rows of y.
template <typename Rows>
void multiply_columns(const Blocks& w, const Rows& rows, int64_t count, int64_t begin, BFloat16* y, int64_t y_stride) {
  alignas(64) static thread_local BFloat16 tile[TILE_CHANNELS * HALF_STRIP];
  std::vector<float> sums(rows.padded() * HALF_STRIP);
  for (int64_t k = 0; k < w.K; k += TILE_CHANNELS) {
    const int64_t channels = std::min(TILE_CHANNELS, w.K - k);
    widen_pairs(w, k, k + channels, begin, tile);
    rows.multiply(k, tile, channels / 2, sums.data());
  }
  store_half(sums.data(), count, w.N - begin, y, y_stride);
}

template <typename Rows>
void multiply_by(const Blocks& w, const at::Tensor& x, at::Tensor& y) {
  const int64_t count = x.size(0), stride = y.stride(0);
  const Rows rows(x.const_data_ptr<BFloat16>(), count, w.K);
  auto* to = y.mutable_data_ptr<BFloat16>();
  at::parallel_for(0, (w.N + HALF_STRIP - 1) / HALF_STRIP, 1, [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename Rows::Scope scope;
    for (int64_t n = first * HALF_STRIP; n < std::min(w.N, last * HALF_STRIP); n += HALF_STRIP)
      multiply_columns(w, rows, count, n, to + n, stride);
  });
}

void block_matmul(const at::Tensor& x, const at::Tensor& data, at::IntArrayRef type, at::Tensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kBFloat16, "x: expected rows of bf16");
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(0) == x.size(0) && y.stride(1) == 1 && y.scalar_type() == at::kBFloat16,
                    "y: expected as many rows of bf16");
  const Blocks weight = blocks_of(data, type, x.size(1), y.size(1));
#if defined(TEAL_AMX)
  if (amx_permitted()) return multiply_by<TileRows<HALF_STRIP>>(weight, x, y);
#endif
  multiply_by<VectorRows>(weight, x, y);
}

}  // namespace
}  // namespace teal

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def("block_matmul(Tensor x, Tensor data, int[] type, Tensor(a!) y) -> ()");
  library.impl("block_matmul", c10::DispatchKey::CPU, teal::block_matmul);
}
#endif
