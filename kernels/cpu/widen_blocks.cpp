// Block types (kernels/formats/blocks.py) to floats: rows for products with many rows of x, columns for an embedding.

#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "matrix.h"
#include "octets.h"

namespace teal {
namespace {

constexpr int VECTORS = STRIP / LANES;

// The integers of a strip of a row, in the order of columns.
template <int BITS>
TEAL_INLINE void strip_floats(const Blocks& w, int64_t channel, int64_t strip, Lanes found[VECTORS]) {
  using Unsigned = uint8_t __attribute__((vector_size(LANES)));
  Octets halves[2];
  strip_octets<BITS>(w.values + channel * w.row_bytes(), w.columns(), strip, halves);
  for (int h = 0; h < 2; ++h) halves[h] = ordered(halves[h]);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(halves);
  for (int v = 0; v < VECTORS; ++v)
    found[v] = __builtin_convertvector(load_bytes<Unsigned>(bytes + v * LANES), Lanes);
}

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

// The value of a weight, rounded twice as the gguf package does.
TEAL_INLINE Lanes weight_of(const Blocks& w, const Lanes& integer, const Lanes& scale, const Lanes& minimum) {
  const Lanes product = (integer - static_cast<float>(w.offset)) * scale;
  return w.has_minima ? product + minimum : product;
}

// Rows of one group and strip, of which count columns are there.
template <int BITS, typename T>
void widen_strip(const Blocks& w, const Scales& s, int64_t first, int64_t last, int64_t strip, T* out, int64_t stride) {
  const int64_t column = strip * STRIP, count = std::min(STRIP, w.N - column);
  Lanes scale[VECTORS], minimum[VECTORS] = {};
  for (int v = 0; v < VECTORS; ++v) {
    scale[v] = scale_of(w, s, first, column + v * LANES);
    if (w.has_minima) minimum[v] = minimum_of(w, s, first, column + v * LANES);
  }
  for (int64_t k = first; k < last; ++k, out += stride) {
    Lanes found[VECTORS];
    strip_floats<BITS>(w, k, strip, found);
    T row[STRIP];
    T* to = count == STRIP ? out : row;
    for (int v = 0; v < VECTORS; ++v) store(to + v * LANES, weight_of(w, found[v], scale[v], minimum[v]));
    if (count < STRIP) std::copy_n(row, count, out);
  }
}

}  // namespace

void widen_blocks(const Blocks& w, Dtype dtype, int64_t first, int64_t last, void* out, int64_t stride) {
  const Scales scales(w);
  by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    by_bits(w, [&](auto bits) {
      for (int64_t k = first; k < last; k += w.group)
        for (int64_t strip = 0; strip < w.columns() / STRIP; ++strip) {
          T* to = static_cast<T*>(out) + (k - first) * stride + strip * STRIP;
          widen_strip<bits.value>(w, scales, k, std::min(last, k + w.group), strip, to, stride);
        }
    });
  });
}

void widen_column(const Blocks& w, int64_t n, float* out) {
  const Scales scales(w);
  const int64_t v = n % STRIP / LANES, begin = n / LANES * LANES;
  for (int64_t k = 0; k < w.K; ++k) {
    if (k + 8 < w.K) __builtin_prefetch(w.values + (k + 8) * w.row_bytes() + n / STRIP * w.bits * (STRIP / 8));
    Lanes found[VECTORS];
    by_bits(w, [&](auto bits) { strip_floats<bits.value>(w, k, n / STRIP, found); });
    const Lanes minimum = w.has_minima ? minimum_of(w, scales, k, begin) : Lanes{};
    out[k] = weight_of(w, found[v], scale_of(w, scales, k, begin), minimum)[n - begin];
  }
}

}  // namespace teal
