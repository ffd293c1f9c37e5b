// What blocks.cpp and widen_blocks.cpp do, with registers of 256 bits, for processors without AVX-512. It goes by
// halves of their registers of 64 bytes, which GCC 12 takes through memory there. 1536 x 1536 in Q4_1, Q6_K, Q8_0 took
// 271, 698, 288 us of a Zen 5 core as compiled for AVX2. They take 89, 149, 122; floats in bf16 take 124 to 157.
#pragma once

#include "blocks.h"
#include "octets.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512BW__)
#define TEAL_AVX2

namespace teal {

TEAL_INLINE __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// 32 bytes of a row's strip: of columns 64 side to 64 side + 63, those in half h of a register of 64.
template <int BITS>
TEAL_INLINE __m256i half_bytes(const uint8_t* row, int64_t columns, int64_t strip, int side, int h) {
  if constexpr (BITS == 8) return load_256(row + strip * 128 + side * 64 + 32 * h);
  const __m256i packed = load_256(row + strip * 64 + 32 * h), nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(side ? _mm256_srli_epi16(packed, 4) : packed, nibble);
  if constexpr (BITS == 4) return low;
  const uint8_t* bits = row + columns / 2 + strip * 16 * (BITS - 4);
  const __m256i all = BITS == 6 ? load_256(bits) : _mm256_broadcastsi128_si256(load_bytes<__m128i>(bits));
  const __m256i right = BITS == 6 ? _mm256_set1_epi32(2 * h) : _mm256_add_epi32(
      _mm256_set1_epi32(2 * h), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  const __m256i moved = side ? _mm256_srlv_epi32(all, right)
                             : _mm256_sllv_epi32(all, _mm256_sub_epi32(_mm256_set1_epi32(4), right));
  return _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(BITS == 6 ? 0x30 : 0x10)));
}

// As interleave of octets.h, of one half.
TEAL_INLINE void interleave_256(const __m256i rows[4], __m256i out[4]) {
  const __m256i low = _mm256_unpacklo_epi8(rows[0], rows[1]), high = _mm256_unpackhi_epi8(rows[0], rows[1]);
  const __m256i next_low = _mm256_unpacklo_epi8(rows[2], rows[3]), next_high = _mm256_unpackhi_epi8(rows[2], rows[3]);
  out[0] = _mm256_unpacklo_epi16(low, next_low);
  out[1] = _mm256_unpackhi_epi16(low, next_low);
  out[2] = _mm256_unpacklo_epi16(high, next_high);
  out[3] = _mm256_unpackhi_epi16(high, next_high);
}

// sums + the products of each lane's four bytes of QUADS weights with the four of x. Two products, and those of two
// quads, are added in 16 bits. Eight bits of weights would not fit there, and go as two nibbles.
template <int BITS, int QUADS>
TEAL_INLINE __m256i add_products_256(__m256i sums, const __m256i weights[QUADS], const int32_t x[QUADS]) {
#if defined(__AVXVNNI__)
  for (int q = 0; q < QUADS; ++q) sums = _mm256_dpbusd_avx_epi32(sums, weights[q], _mm256_set1_epi32(x[q]));
  return sums;
#else
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i low = _mm256_setzero_si256(), high = low;
  for (int q = 0; q < QUADS; ++q) {
    const __m256i four = _mm256_set1_epi32(x[q]);
    const __m256i bytes = BITS < 8 ? weights[q] : _mm256_and_si256(weights[q], nibble);
    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(bytes, four));
    if constexpr (BITS == 8) {
      const __m256i tops = _mm256_and_si256(_mm256_srli_epi16(weights[q], 4), nibble);
      high = _mm256_add_epi16(high, _mm256_maddubs_epi16(tops, four));
    }
  }
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  return BITS < 8 ? sums : _mm256_add_epi32(sums, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
#endif
}

// found[row][digit][vector] += products of a strip with QUADS quads of channels.
template <int BITS, int ROWS, int DIGITS, int QUADS>
TEAL_INLINE void add_strip_256(const Blocks& w, const int32_t* channels, int64_t strip,
                               const int32_t (*x)[DIGITS][QUADS], Integers (*found)[DIGITS][8]) {
  for (int h = 0; h < 2; ++h)
    for (int side = 0; side < 2; ++side) {
      __m256i weights[QUADS][4];
      for (int q = 0; q < QUADS; ++q) {
        __m256i rows[4];
        for (int k = 0; k < 4; ++k)
          rows[k] = half_bytes<BITS>(w.values + channels[4 * q + k] * w.row_bytes(), w.columns(), strip, side, h);
        interleave_256(rows, weights[q]);
      }
      for (int v = 0; v < 4; ++v) {
        __m256i own[QUADS];
        for (int q = 0; q < QUADS; ++q) own[q] = weights[q][v];
        for (int r = 0; r < ROWS; ++r)
          for (int t = 0; t < DIGITS; ++t) {
            auto* to = reinterpret_cast<__m256i*>(&found[r][t][4 * side + v]) + h;
            _mm256_storeu_si256(to, add_products_256<BITS, QUADS>(load_256(to), own, x[r][t]));
          }
      }
    }
}

TEAL_INLINE __m256 floats_256(const Half* from) { return _mm256_cvtph_ps(load_bytes<__m128i>(from)); }
TEAL_INLINE __m256 floats_256(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

// scale_of and minimum_of of blocks.h, of 8 columns.
TEAL_INLINE __m256 scale_256(const Blocks& w, const Scales& s, int64_t channel, int64_t n) {
  const int64_t at = channel / w.group * w.columns() + n;
  if (!w.nested) return floats_256(reinterpret_cast<const Half*>(s.scales) + at);
  const __m256 super = floats_256(s.supers + channel / SUPER * w.columns() + n);
  return _mm256_mul_ps(floats_256(reinterpret_cast<const int8_t*>(s.scales) + at), super);
}
TEAL_INLINE __m256 minimum_256(const Blocks& w, const Scales& s, int64_t channel, int64_t n) {
  const int64_t at = channel / MIN_GROUP * w.columns() + n;
  if (!w.nested) return floats_256(reinterpret_cast<const Half*>(s.minima) + at);
  const __m256 super = floats_256(s.super_minima + channel / SUPER * w.columns() + n);
  const __m256 minus = _mm256_sub_ps(_mm256_setzero_ps(), floats_256(reinterpret_cast<const int8_t*>(s.minima) + at));
  return _mm256_mul_ps(minus, super);
}

// sums [ROWS][stride] += a strip's whole numbers of a group, times scales, and minima times the sum of entries.
template <int ROWS, int DIGITS, bool MINIMA>
TEAL_INLINE void add_scaled_256(const Blocks& w, const Scales& s, int64_t channel, const float unit[ROWS],
                                const float entries[ROWS], int64_t column, const Integers (*found)[DIGITS][8],
                                float* sums, int64_t stride) {
  for (int64_t n = 0; n < STRIP; n += 8) {
    const __m256 scale = scale_256(w, s, channel, column + n);
    const __m256 minimum = MINIMA ? minimum_256(w, s, channel, column + n) : _mm256_setzero_ps();
    for (int r = 0; r < ROWS; ++r) {
      const auto digit = [&](int t) {
        return _mm256_cvtepi32_ps(load_256(reinterpret_cast<const char*>(found[r][t]) + 4 * n));
      };
      __m256 total = digit(DIGITS - 1);
      for (int t = DIGITS - 1; t-- > 0;) total = _mm256_fmadd_ps(total, _mm256_set1_ps(256.0f), digit(t));
      float* to = sums + r * stride + n;
      __m256 sum = _mm256_fmadd_ps(total, _mm256_mul_ps(scale, _mm256_set1_ps(unit[r])), _mm256_loadu_ps(to));
      if (MINIMA) sum = _mm256_fmadd_ps(minimum, _mm256_set1_ps(entries[r]), sum);
      _mm256_storeu_ps(to, sum);
    }
  }
}

TEAL_INLINE void store_256(float* to, __m256 x) { _mm256_storeu_ps(to, x); }
TEAL_INLINE void store_256(Half* to, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
TEAL_INLINE void store_256(BFloat16* to, __m256 x) {  // as store of floats.h
  const __m256i words = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(words, 16), _mm256_set1_epi32(1));
  const __m256i sums = _mm256_add_epi32(_mm256_add_epi32(words, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i halves = _mm256_srli_epi32(sums, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

// Rows of one group and strip as floats, rounded twice as the gguf package does: out [last - first, stride].
template <int BITS, typename T>
TEAL_INLINE void widen_strip_256(const Blocks& w, const Scales& s, int64_t first, int64_t last, int64_t strip, T* out,
                                 int64_t stride) {
  const __m256 offset = _mm256_set1_ps(static_cast<float>(w.offset));
  for (int side = 0; side < 2; ++side)
    for (int h = 0; h < 2; ++h) {
      __m256 scale[4], minimum[4];  // of columns 16 b + 8 h to 16 b + 8 h + 7 of the side
      for (int b = 0; b < 4; ++b) {
        const int64_t n = strip * STRIP + side * 64 + 16 * b + 8 * h;
        scale[b] = scale_256(w, s, first, n);
        minimum[b] = w.has_minima ? minimum_256(w, s, first, n) : _mm256_setzero_ps();
      }
      for (int64_t k = first; k < last; ++k) {
        const __m256i bytes = half_bytes<BITS>(w.values + k * w.row_bytes(), w.columns(), strip, side, h);
        const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
        const __m128i pairs[2] = {_mm_unpacklo_epi32(low, high), _mm_unpackhi_epi32(low, high)};
        for (int b = 0; b < 4; ++b) {
          const __m128i eight = b % 2 ? _mm_unpackhi_epi64(pairs[b / 2], pairs[b / 2]) : pairs[b / 2];
          const __m256 integers = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight));
          __m256 x = _mm256_mul_ps(_mm256_sub_ps(integers, offset), scale[b]);
          if (w.has_minima) x = _mm256_add_ps(x, minimum[b]);
          store_256(out + (k - first) * stride + side * 64 + 16 * b + 8 * h, x);
        }
      }
    }
}

}  // namespace teal
#endif
