// Bytes of weights in registers: from a strip of blocks.py, and in products of four at a time. avx2.h has those with
// registers of 256 bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "floats.h"

namespace teal {

using Octets = uint8_t __attribute__((vector_size(64)));

template <typename Register>
TEAL_INLINE Register load_bytes(const void* from) {
  Register found;
  std::memcpy(&found, from, sizeof(found));
  return found;
}

// A register of copies of so many bytes.
template <int BYTES>
TEAL_INLINE Octets repeated(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (BYTES == 16)
    return reinterpret_cast<Octets>(_mm512_broadcast_i32x4(load_bytes<__m128i>(from)));
  else
    return reinterpret_cast<Octets>(_mm512_broadcast_i64x4(load_bytes<__m256i>(from)));
#else
  Octets found;
  for (int i = 0; i < 64; i += BYTES) std::memcpy(reinterpret_cast<char*>(&found) + i, from, BYTES);
  return found;
#endif
}

// A strip's bits above the fourth, of its halves, in the fifth and sixth of each byte; bits: as blocks.py packs them.
// Words are shifted: what comes over from a neighbouring byte is not among the bits wanted.
template <int BITS>
TEAL_INLINE void high_bits(const uint8_t* bits, Octets halves[2]) {
  constexpr Words RIGHT5 = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  constexpr Words RIGHT6 = {0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2};
  constexpr Words RIGHT = BITS == 5 ? RIGHT5 : RIGHT6;
  constexpr uint8_t WANTED = BITS == 5 ? 0x10 : 0x30;
  const Words words = reinterpret_cast<Words>(repeated<BITS == 5 ? 16 : 32>(bits));
  halves[0] = reinterpret_cast<Octets>(words << (4 - RIGHT)) & WANTED;
  halves[1] = reinterpret_cast<Octets>(words >> RIGHT) & WANTED;
}

// The integers of a row's strip of so many columns, as bytes: those of columns 0 to 63 and of 64 to 127.
template <int BITS>
TEAL_INLINE void strip_octets(const uint8_t* row, int64_t columns, int64_t strip, Octets halves[2]) {
  if constexpr (BITS == 8) {
    for (int h = 0; h < 2; ++h) halves[h] = load_bytes<Octets>(row + strip * 128 + h * 64);
  } else {
    const Octets low = load_bytes<Octets>(row + strip * 64);
    if constexpr (BITS == 4) {
      halves[0] = low & 15;
      halves[1] = low >> 4;
    } else {
      high_bits<BITS>(row + columns / 2 + strip * 16 * (BITS - 4), halves);
      halves[0] |= low & 15;
      halves[1] |= low >> 4;
    }
  }
}

// Half a strip's bytes in the order of columns.
TEAL_INLINE Octets ordered(const Octets& half) {
#if defined(__AVX512F__)
  const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<Octets>(_mm512_permutexvar_epi32(places, reinterpret_cast<__m512i>(half)));
#else
  Octets found;
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b) {
      const char* from = reinterpret_cast<const char*>(&half) + 16 * a + 4 * b;
      std::memcpy(reinterpret_cast<char*>(&found) + 16 * b + 4 * a, from, 4);
    }
  return found;
#endif
}

// The bytes of four rows side by side: lane i of out[v] holds column 16 v + i of each (blocks.py, order of columns).
TEAL_INLINE void interleave(const Octets rows[4], Octets out[4]) {
#if defined(__AVX512BW__)
  const auto of = [&](int i) { return reinterpret_cast<__m512i>(rows[i]); };
  const __m512i low = _mm512_unpacklo_epi8(of(0), of(1)), high = _mm512_unpackhi_epi8(of(0), of(1));
  const __m512i next_low = _mm512_unpacklo_epi8(of(2), of(3)), next_high = _mm512_unpackhi_epi8(of(2), of(3));
  out[0] = reinterpret_cast<Octets>(_mm512_unpacklo_epi16(low, next_low));
  out[1] = reinterpret_cast<Octets>(_mm512_unpackhi_epi16(low, next_low));
  out[2] = reinterpret_cast<Octets>(_mm512_unpacklo_epi16(high, next_high));
  out[3] = reinterpret_cast<Octets>(_mm512_unpackhi_epi16(high, next_high));
#else
  for (int v = 0; v < 4; ++v)
    for (int lane = 0; lane < LANES; ++lane)
      for (int row = 0; row < 4; ++row) out[v][4 * lane + row] = rows[row][lane / 4 * 16 + 4 * v + lane % 4];
#endif
}

// sums + the products of each lane's four bytes with the four of x, which are signed.
TEAL_INLINE Integers add_products(const Integers& sums, const Octets& weights, int32_t x) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(weights), _mm512_set1_epi32(x)));
#else
  const Words lanes = load_bytes<Words>(&weights);
  Integers found = sums;
  for (int k = 0; k < 4; ++k)
    found += __builtin_convertvector(lanes >> (8 * k) & 255, Integers) * static_cast<int8_t>(x >> (8 * k));
  return found;
#endif
}

}  // namespace teal
