// Products of many rows of 16 bits with weights in blocks, for processors that have VNNI and no bf16. Entries of x are
// rounded to whole numbers of 16 bits, as those of few rows (blocks.cpp). Columns become pairs of channels of 16 bits,
// for so many channels that they stay in L1 while all rows meet them. block_linear.py has the op.
//
// One instruction multiplies two channels of 16 columns with a row's entries. With a group's scales a row's products of
// 32 channels and 64 columns take 40 cycles, in fp32 64. 512 rows of 1536 x 8960 in Q4_K take two Xeon cores 31 ms, and
// 61 by torch in fp32.
//
// A column's sum has the same bits in any thread, and a row's beside any others.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "half_strips.h"
#include "octets.h"
#include "tensors.h"
#include "whole_numbers.h"

#if defined(__AVX512VNNI__)
namespace teal {
namespace {

constexpr int64_t CHANNELS = 256;  // in a tile
constexpr int64_t HALVES = 4;      // of strips, for which a thread takes some channels of x from L3 once

// A group's entries of some rows of x.
struct Group {
  int32_t pairs[ROWS][MIN_GROUP / 2];  // of 16 bits
  float unit[ROWS], sum[ROWS];         // what 1 is worth; of all entries
};

// Some channels of half a strip: 16 KB, and what their groups have.
struct alignas(64) Tile {
  Integers pairs[CHANNELS / 2][VECTORS];
  Lanes scales[CHANNELS / 16][VECTORS], minima[CHANNELS / MIN_GROUP][VECTORS];
};

// All rows of x, [blocks of ROWS rows][groups]; the last block is filled up with zeros.
std::vector<Group> groups_of(const at::Tensor& x, int64_t size) {
  constexpr float MOST = 127 << 8;  // as two bytes with signs hold
  const int64_t rows = x.size(0), K = x.size(1), blocks = (rows + ROWS - 1) / ROWS, groups = K / size;
  const Dtype dtype = dtype_of(x.scalar_type());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  std::vector<Group> found(blocks * groups);
  at::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    alignas(64) float values[MIN_GROUP] = {};
    for (int64_t row = first; row < last; ++row)
      for (int64_t g = 0; g < groups; ++g) {
        Group& group = found[row / ROWS * groups + g];
        const int64_t r = row % ROWS;
        widen_values(from + (row * K + g * size) * x.element_size(), dtype, size, values);
        Integers numbers[2];
        group.unit[r] = whole_numbers(values, MOST, numbers);
        group.sum[r] = static_cast<float>(total(numbers[0]) + total(numbers[1])) * group.unit[r];
        for (int h = 0; h < 2; ++h) {
          using Shorts = int16_t __attribute__((vector_size(2 * LANES)));
          const Shorts shorts = __builtin_convertvector(numbers[h], Shorts);
          std::memcpy(group.pairs[r] + h * LANES / 2, &shorts, sizeof(shorts));
        }
      }
  });
  return found;
}

template <int BITS>
void fill_pairs(const Blocks& w, int64_t first, int64_t last, int64_t begin, Integers (*pairs)[VECTORS]) {
  for (int64_t k = first; k < last; k += 2, ++pairs) {
    Octets rows[4] = {}, found[4];  // a channel's byte, and zeros above it
    for (int i = 0; i < 2; ++i) {
      Octets halves[2];
      strip_octets<BITS>(w.values + (k + i) * w.row_bytes(), w.columns(), begin / STRIP, halves);
      rows[2 * i] = begin % STRIP ? halves[1] : halves[0];
    }
    interleave(rows, found);
    for (int v = 0; v < VECTORS; ++v)
      (*pairs)[v] = reinterpret_cast<Integers>(
          _mm512_sub_epi16(reinterpret_cast<__m512i>(found[v]), _mm512_set1_epi16(static_cast<int16_t>(w.offset))));
  }
}

// Channels first to last of the columns from begin on.
void fill_tile(const Blocks& w, int64_t first, int64_t last, int64_t begin, Tile& tile) {
  by_bits(w, [&](auto bits) { fill_pairs<bits.value>(w, first, last, begin, tile.pairs); });
  const Scales scales(w);
  for (int64_t k = first; k < last; k += w.group)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t n = begin + v * LANES;
      tile.scales[(k - first) / w.group][v] = scale_of(w, scales, k, n);
      if (w.has_minima) tile.minima[(k - first) / MIN_GROUP][v] = minimum_of(w, scales, k, n);
    }
}

// sums [blocks][ROWS][64] += count groups of rows, which lie stride apart from block to block, times a tile.
template <int PAIRS, bool MINIMA>
void multiply_tile(const Tile& tile, const Group* groups, int64_t stride, int64_t blocks, int64_t count, float* sums) {
  for (int64_t b = 0; b < blocks; ++b, groups += stride, sums += ROWS * HALF_STRIP)
    for (int64_t g = 0; g < count; ++g) {
      const Group& x = groups[g];
      Integers found[ROWS][VECTORS] = {};
      for (int p = 0; p < PAIRS; ++p)
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECTORS; ++v)
            found[r][v] = reinterpret_cast<Integers>(_mm512_dpwssd_epi32(
                reinterpret_cast<__m512i>(found[r][v]), reinterpret_cast<__m512i>(tile.pairs[g * PAIRS + p][v]),
                _mm512_set1_epi32(x.pairs[r][p])));
      for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) {
          float* to = sums + r * HALF_STRIP + v * LANES;
          Lanes sum = add_product(load(to), __builtin_convertvector(found[r][v], Lanes), tile.scales[g][v] * x.unit[r]);
          if (MINIMA) sum = add_product(sum, tile.minima[g][v], Lanes{} + x.sum[r]);
          store(to, sum);
        }
    }
}

// Columns begin to end of a weight, HALVES halves of strips at most, into y.
void multiply_columns(const Blocks& w, const std::vector<Group>& x, int64_t begin, int64_t end, at::Tensor& y) {
  static thread_local Tile tile;
  const int64_t groups = w.K / w.group, blocks = x.size() / groups, size = blocks * ROWS * HALF_STRIP;
  const auto multiply = w.group == 16 ? multiply_tile<8, false>
                        : w.has_minima ? multiply_tile<16, true>
                                       : multiply_tile<16, false>;
  std::vector<float> sums(HALVES * size);
  for (int64_t k = 0; k < w.K; k += CHANNELS) {
    const int64_t last = std::min(w.K, k + CHANNELS);
    for (int64_t n = begin, half = 0; n < end; n += HALF_STRIP, ++half) {
      fill_tile(w, k, last, n, tile);
      multiply(tile, x.data() + k / w.group, groups, blocks, (last - k) / w.group, sums.data() + half * size);
    }
  }
  by_dtype(dtype_of(y.scalar_type()), [&](auto type) {
    auto* to = static_cast<decltype(type)*>(y.mutable_data_ptr());
    for (int64_t n = begin, half = 0; n < end; n += HALF_STRIP, ++half)
      store_half(sums.data() + half * size, y.size(0), end - n, to + n, y.stride(0));
  });
}

void integer_matmul(const at::Tensor& x, const at::Tensor& data, at::IntArrayRef type, at::Tensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous() && x.element_size() == 2, "x: expected rows of bf16 or fp16");
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(0) == x.size(0) && y.stride(1) == 1 && y.scalar_type() == x.scalar_type(),
                    "y: expected as many rows of x's dtype");
  const Blocks weight = blocks_of(data, type, x.size(1), y.size(1));
  const std::vector<Group> groups = groups_of(x, weight.group);
  const int64_t halves = (weight.N + HALF_STRIP - 1) / HALF_STRIP;
  at::parallel_for(0, halves, 1, [&](int64_t first, int64_t last) {
    for (int64_t h = first; h < last; h += HALVES)
      multiply_columns(weight, groups, h * HALF_STRIP, std::min(weight.N, std::min(last, h + HALVES) * HALF_STRIP), y);
  });
}

}  // namespace
}  // namespace teal

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def("integer_matmul(Tensor x, Tensor data, int[] type, Tensor(a!) y) -> ()");
  library.impl("integer_matmul", c10::DispatchKey::CPU, teal::integer_matmul);
}
#endif
