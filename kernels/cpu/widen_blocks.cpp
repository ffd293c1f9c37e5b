// Block types (kernels/formats/blocks.py) to floats: rows for products with many rows of x, columns for an embedding.

#include <algorithm>

#include "avx2.h"
#include "blocks.h"
#include "matrix.h"
#include "octets.h"

namespace teal {
namespace {

constexpr int VECTORS = STRIP / LANES;

// The integers of a strip of a row, in the order of columns.
template <int BITS>
TEAL_INLINE void strip_floats(const Blocks& w, int64_t channel, int64_t strip, Lanes found[VECTORS]) {
  Octets halves[2];
  strip_octets<BITS>(w.values + channel * w.row_bytes(), w.columns(), strip, halves);
  for (int h = 0; h < 2; ++h) halves[h] = ordered(halves[h]);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(halves);
  for (int v = 0; v < VECTORS; ++v) found[v] = load(bytes + v * LANES);
}

#if defined(__AVX512BF16__)
// As strip_floats, of one half.
template <int BITS, int HALF>
TEAL_INLINE void half_floats(const Blocks& w, int64_t channel, int64_t strip, Lanes found[VECTORS / 2]) {
  Octets halves[2];
  strip_octets<BITS>(w.values + channel * w.row_bytes(), w.columns(), strip, halves);
  const Octets half = ordered(halves[HALF]);
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(&half);
  for (int v = 0; v < VECTORS / 2; ++v) found[v] = load(bytes + v * LANES);
}
#endif

// The value of a weight, rounded twice as the gguf package does.
TEAL_INLINE Lanes weight_of(const Blocks& w, const Lanes& integer, const Lanes& scale, const Lanes& minimum) {
  const Lanes product = (integer - static_cast<float>(w.offset)) * scale;
  return w.has_minima ? product + minimum : product;
}

// Rows of one group and strip, of which count columns are wanted.
template <int BITS, typename T>
void widen_strip(const Blocks& w, const Scales& s, int64_t first, int64_t last, int64_t strip, int64_t count, T* out,
                 int64_t stride) {
#if defined(TEAL_AVX2)
  if (count == STRIP) return widen_strip_256<BITS>(w, s, first, last, strip, out, stride);
  T rows[MIN_GROUP * STRIP];
  widen_strip_256<BITS>(w, s, first, last, strip, rows, STRIP);
  for (int64_t k = 0; k < last - first; ++k) std::copy_n(rows + k * STRIP, count, out + k * stride);
#else
  const int64_t column = strip * STRIP;
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
#endif
}

#if defined(__AVX512BF16__)
// Two rows' vectors of floats, each rounded to bf16, by turns.
TEAL_INLINE void store_pair(BFloat16* to, const Lanes& a, const Lanes& b) {
  const __m512i turns = _mm512_add_epi16(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(0x10001)));
  const auto both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(turns, reinterpret_cast<__m512i>(both)));
}

template <int BITS, int HALF, bool MINIMA>
void widen_half(Blocks w, int64_t first, int64_t last, int64_t begin, BFloat16* out) {
  w.has_minima = MINIMA;  // a local copy, as in blocks.cpp
  const Scales scales(w);
  for (int64_t k = first; k < last; k += w.group) {
    Lanes scale[VECTORS / 2], minimum[VECTORS / 2] = {};
    for (int v = 0; v < VECTORS / 2; ++v) {
      scale[v] = scale_of(w, scales, k, begin + v * LANES);
      if (MINIMA) minimum[v] = minimum_of(w, scales, k, begin + v * LANES);
    }
    for (int64_t i = k; i < k + w.group; i += 2, out += STRIP) {
      Lanes a[VECTORS / 2], b[VECTORS / 2];
      half_floats<BITS, HALF>(w, i, begin / STRIP, a);
      half_floats<BITS, HALF>(w, i + 1, begin / STRIP, b);
      for (int v = 0; v < VECTORS / 2; ++v)
        store_pair(out + 2 * v * LANES, weight_of(w, a[v], scale[v], minimum[v]),
                   weight_of(w, b[v], scale[v], minimum[v]));
    }
  }
}
#endif

}  // namespace

#if defined(__AVX512BF16__)
void widen_pairs(const Blocks& w, int64_t first, int64_t last, int64_t begin, BFloat16* out) {
  by_bits(w, [&](auto bits) {
    constexpr int BITS = decltype(bits)::value;
    const bool second = begin % STRIP != 0;
    if (w.has_minima)
      second ? widen_half<BITS, 1, true>(w, first, last, begin, out)
             : widen_half<BITS, 0, true>(w, first, last, begin, out);
    else
      second ? widen_half<BITS, 1, false>(w, first, last, begin, out)
             : widen_half<BITS, 0, false>(w, first, last, begin, out);
  });
}
#endif

void widen_blocks(const Blocks& w, Dtype dtype, int64_t first, int64_t last, int64_t begin, int64_t end, void* out,
                  int64_t stride) {
  const Scales scales(w);
  by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    by_bits(w, [&](auto bits) {
      for (int64_t k = first; k < last; k += w.group)
        for (int64_t n = begin; n < end; n += STRIP) {
          T* to = static_cast<T*>(out) + (k - first) * stride + n - begin;
          const int64_t count = std::min(STRIP, end - n);
          widen_strip<bits.value>(w, scales, k, std::min(last, k + w.group), n / STRIP, count, to, stride);
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
