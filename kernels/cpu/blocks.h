// A weight of one of GGUF's block types, in the layout of kernels/formats/blocks.py, and what reads it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "floats.h"

namespace teal {

constexpr int64_t STRIP = 128;  // columns
constexpr int64_t SUPER = 256, MIN_GROUP = 32;  // channels to a super-scale, and to a minimum

// step/launch.py mirrors this struct, field by field.
struct Blocks {
  const uint8_t* values;
  int64_t K, N;
  int32_t bits, offset, group, has_minima, nested, padding;

  int64_t columns() const { return (N + STRIP - 1) / STRIP * STRIP; }
  int64_t row_bytes() const { return columns() * bits / 8; }
};

// f with the number of bits as a type.
template <typename F>
auto by_bits(const Blocks& w, F&& f) {
  switch (w.bits) {
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

// Where the parts of a weight that follow its values begin.
struct Scales {
  const char *scales, *minima;  // Half, or int8_t if nested
  const Half *supers, *super_minima;

  explicit Scales(const Blocks& w) {
    const int64_t row = w.columns() * (w.nested ? 1 : sizeof(Half));
    scales = reinterpret_cast<const char*>(w.values) + w.K * w.row_bytes();
    minima = scales + w.K / w.group * row;
    supers = reinterpret_cast<const Half*>(minima + (w.has_minima ? w.K / MIN_GROUP * row : 0));
    super_minima = supers + w.K / SUPER * w.columns();
  }
};

// Of LANES columns from n on, the scale and the minimum of a channel.
TEAL_INLINE Lanes scale_of(const Blocks& w, const Scales& s, int64_t channel, int64_t n) {
  const int64_t at = channel / w.group * w.columns() + n;
  if (!w.nested) return load(reinterpret_cast<const Half*>(s.scales) + at);
  return load(reinterpret_cast<const int8_t*>(s.scales) + at) * load(s.supers + channel / SUPER * w.columns() + n);
}

TEAL_INLINE Lanes minimum_of(const Blocks& w, const Scales& s, int64_t channel, int64_t n) {
  const int64_t at = channel / MIN_GROUP * w.columns() + n;
  if (!w.nested) return load(reinterpret_cast<const Half*>(s.minima) + at);
  const Lanes super = load(s.super_minima + channel / SUPER * w.columns() + n);
  return -load(reinterpret_cast<const int8_t*>(s.minima) + at) * super;
}

// x [rows, stride] of a product with some channels of a weight. rows are GATHER_ROWS at most. Entries with |x| < limit
// count as 0, and what they alone meet is not read.
struct Entries {
  const float* x;
  int64_t stride, rows;
  float limit;
  int64_t first, last;  // channels: multiples of 32
};

// y[r][0..end - begin) = the sums over the channels of entries, for columns begin to end. dtype is that of x. A row of
// x has the same bits alone and beside others, and a column in any part of the weight.
void multiply_blocks(const Blocks& weight, Dtype dtype, const Entries& entries, int64_t begin, int64_t end, float* y,
                     int64_t y_stride);

// The weight's rows first to last and columns begin to end in dtype, out [last - first, stride]. first is a multiple of
// 32, begin of a strip.
void widen_blocks(const Blocks& weight, Dtype dtype, int64_t first, int64_t last, int64_t begin, int64_t end, void* out,
                  int64_t stride);

#if defined(__AVX512BF16__)
// Rows first to last, both even, of the half of a strip that begins at column begin. In bf16, by pairs of rows: out
// [(last - first) / 2][64][2].
void widen_pairs(const Blocks& weight, int64_t first, int64_t last, int64_t begin, BFloat16* out);
#endif

// Column n, fp32 [K].
void widen_column(const Blocks& weight, int64_t n, float* out);

}  // namespace teal
