// Block types (kernels/formats/blocks.py) to floats: rows for products with many rows of x, columns for an embedding.

#include <algorithm>

#include "blocks.h"
#include "matrix.h"
#include "octets.h"

namespace teal {
namespace {

constexpr int VECTORS = STRIP / LANES;

// The integers of a strip of a row, in the order of columns.
template <int BITS>
void strip_floats(const Blocks& w, int64_t channel, int64_t strip, Lanes found[VECTORS]) {
  Octets halves[2];
  strip_octets<BITS>(w.values + channel * w.row_bytes(), w.columns(), strip, halves);
  for (int v = 0; v < VECTORS; ++v) {
    const char* half = reinterpret_cast<const char*>(halves + v / 4);
    uint8_t bytes[LANES];
    for (int a = 0; a < 4; ++a) std::memcpy(bytes + 4 * a, half + 16 * a + v % 4 * 4, 4);
    using Unsigned = uint8_t __attribute__((vector_size(LANES)));
    found[v] = __builtin_convertvector(load_bytes<Unsigned>(bytes), Lanes);
  }
}

void strip_floats(const Blocks& w, int64_t channel, int64_t strip, Lanes found[VECTORS]) {
  switch (w.bits) {
    case 4: return strip_floats<4>(w, channel, strip, found);
    case 5: return strip_floats<5>(w, channel, strip, found);
    case 6: return strip_floats<6>(w, channel, strip, found);
    default: return strip_floats<8>(w, channel, strip, found);
  }
}

// The value of a weight, rounded twice as the gguf package does.
Lanes weight_of(const Blocks& w, const Lanes& integer, const Lanes& scale, const Lanes& minimum) {
  const Lanes product = (integer - static_cast<float>(w.offset)) * scale;
  return w.has_minima ? product + minimum : product;
}

}  // namespace

void widen_blocks(const Blocks& w, Dtype dtype, int64_t first, int64_t last, void* out, int64_t stride) {
  const Scales scales(w);
  by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t strip = 0; strip < w.columns() / STRIP; ++strip)
      for (int64_t k = first; k < last; ++k) {
        Lanes found[VECTORS];
        strip_floats(w, k, strip, found);
        for (int v = 0; v < VECTORS; ++v) {
          const int64_t n = strip * STRIP + v * LANES;
          const Lanes minimum = w.has_minima ? minimum_of(w, scales, k, n) : Lanes{};
          const Lanes values = weight_of(w, found[v], scale_of(w, scales, k, n), minimum);
          T* to = static_cast<T*>(out) + (k - first) * stride + n;
          for (int64_t i = 0; i < std::min(LANES, w.N - n); ++i) to[i] = static_cast<T>(values[i]);
        }
      }
  });
}

void widen_column(const Blocks& w, int64_t n, float* out) {
  const Scales scales(w);
  const int64_t v = n % STRIP / LANES, begin = n / LANES * LANES;
  for (int64_t k = 0; k < w.K; ++k) {
    if (k + 8 < w.K) __builtin_prefetch(w.values + (k + 8) * w.row_bytes() + n / STRIP * w.bits * (STRIP / 8));
    Lanes found[VECTORS];
    strip_floats(w, k, n / STRIP, found);
    const Lanes minimum = w.has_minima ? minimum_of(w, scales, k, begin) : Lanes{};
    out[k] = weight_of(w, found[v], scale_of(w, scales, k, begin), minimum)[n - begin];
  }
}

}  // namespace teal
