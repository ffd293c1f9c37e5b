// Floats of a weight's dtype in and out of fp32, one by one and LANES at a time. Compiled for the processor at hand;
// where it lacks a vector instruction the compiler makes one of several.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For functions of vectors: a call would pass them through memory.
#define TEAL_INLINE inline __attribute__((always_inline))

namespace teal {

using c10::BFloat16;
using c10::Half;

enum class Dtype : int32_t { FP32, BF16, FP16 };

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return static_cast<float>(value); }
// c10::Half's own conversion may be one scalar instruction, which keeps a loop from being vectorized.
inline float widen(Half value) { return c10::detail::fp16_ieee_to_fp32_value(value.x); }

// f with a value of dtype's type: one place for the switch that templates need.
template <typename F>
auto by_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::BF16: return f(BFloat16{});
    case Dtype::FP16: return f(Half{});
    default: return f(float{});
  }
}

// sum + a b in one rounding where the processor can. Terms are added to a sum one by one, in their order. A row of x
// then has the same bits alone and beside other rows, whose terms add 0.
inline float add_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

constexpr int64_t LANES = 16;  // a register of AVX-512
using Lanes = float __attribute__((vector_size(4 * LANES)));
using Bytes = int8_t __attribute__((vector_size(LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Integers = int32_t __attribute__((vector_size(4 * LANES)));

inline int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

inline Lanes load(const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof(lanes));
  return lanes;
}

inline Lanes load(const Half* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(halves)));
#elif defined(__F16C__)
  __m128i parts[2];
  std::memcpy(parts, &halves, sizeof(parts));
  const __m256 floats[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
  Lanes lanes;
  std::memcpy(&lanes, floats, sizeof(lanes));
  return lanes;
#else
  const Words words = __builtin_convertvector(halves, Words);
  const Words sign = (words & 0x8000) << 16, magnitude = (words & 0x7fff) << 13;
  Lanes lanes;
  std::memcpy(&lanes, &magnitude, sizeof(lanes));
  lanes *= 0x1p112f;  // the difference of the exponents' biases; subnormal numbers come out right, too
  Words bits;
  std::memcpy(&bits, &lanes, sizeof(bits));
  bits |= sign | (Words((words & 0x7c00) == 0x7c00) & 0x7f800000);  // infinity and NaN
  std::memcpy(&lanes, &bits, sizeof(lanes));
  return lanes;
#endif
}

// Bytes widen by steps of twice their size: GCC 12 takes them apart one by one where a step is of four times.
inline Lanes load(const int8_t* from) {
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
#if defined(__AVX512F__)
  const auto integers = reinterpret_cast<Integers>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes)));
#else
  using Shorts = int16_t __attribute__((vector_size(2 * LANES)));
  const Integers integers = __builtin_convertvector(__builtin_convertvector(bytes, Shorts), Integers);
#endif
  return __builtin_convertvector(integers, Lanes);
}

inline Lanes load(const uint8_t* from) {
  using Unsigned = uint8_t __attribute__((vector_size(LANES)));
  Unsigned bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
#if defined(__AVX512F__)
  const auto integers = reinterpret_cast<Integers>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(bytes)));
#else
  const auto words = __builtin_convertvector(__builtin_convertvector(bytes, Halves), Words);
  const auto integers = reinterpret_cast<Integers>(words);
#endif
  return __builtin_convertvector(integers, Lanes);
}

inline void store(float* to, const Lanes& lanes) { std::memcpy(to, &lanes, sizeof(lanes)); }

// Rounded to the nearest, ties to even; no lane is NaN. Subnormal numbers may become zeros.
inline void store(BFloat16* to, const Lanes& lanes) {
#if defined(__AVX512BF16__)
  const auto halves = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(lanes));
#else
  Words words;
  std::memcpy(&words, &lanes, sizeof(words));
  const Halves halves = __builtin_convertvector((words + 0x7fff + (words >> 16 & 1)) >> 16, Halves);
#endif
  std::memcpy(to, &halves, sizeof(halves));
}

inline void store(Half* to, const Lanes& lanes) {
#if defined(__AVX512F__)
  const auto halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(lanes), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &halves, sizeof(halves));
#else
  for (int64_t i = 0; i < LANES; ++i) to[i] = static_cast<Half>(lanes[i]);
#endif
}

// The first count values, then zeros.
template <typename T>
Lanes load_part(const T* from, int64_t count) {
  T part[LANES] = {};
  std::memcpy(part, from, count * sizeof(T));
  return load(part);
}

// As add_product, for each lane.
inline Lanes add_product(const Lanes& sum, const Lanes& a, const Lanes& b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  Lanes result;
  for (int64_t i = 0; i < LANES; ++i) result[i] = __builtin_fmaf(a[i], b[i], sum[i]);
  return result;
#else
  return sum + a * b;
#endif
}

inline Lanes larger(const Lanes& a, const Lanes& b) { return a > b ? a : b; }  // b where one of them is NaN

// Half of Lanes or Integers, and a quarter.
using Lanes8 = float __attribute__((vector_size(2 * LANES)));
using Lanes4 = float __attribute__((vector_size(LANES)));
using Integers8 = int32_t __attribute__((vector_size(2 * LANES)));
using Integers4 = int32_t __attribute__((vector_size(LANES)));

// What f makes of all lanes, two at a time, in a fixed order.
template <typename Half8, typename Quarter, typename Register, typename F>
TEAL_INLINE auto folded(const Register& lanes, F&& f) {
  Half8 halves[2];
  std::memcpy(halves, &lanes, sizeof(halves));
  const Half8 half = f(halves[0], halves[1]);
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof(quarters));
  const Quarter quarter = f(quarters[0], quarters[1]);
  return f(f(quarter[0], quarter[2]), f(quarter[1], quarter[3]));
}

inline float total(const Lanes& lanes) {
  return folded<Lanes8, Lanes4>(lanes, [](const auto& a, const auto& b) { return a + b; });
}

#if defined(__AVX512F__)
// As total, of four registers: their last steps are the same instructions.
inline void totals(const Lanes (&registers)[4], float* to) {
  __m128 rows[4];
  for (int i = 0; i < 4; ++i) {
    Lanes8 halves[2];
    std::memcpy(halves, &registers[i], sizeof(halves));
    const Lanes8 half = halves[0] + halves[1];
    Lanes4 quarters[2];
    std::memcpy(quarters, &half, sizeof(quarters));
    rows[i] = reinterpret_cast<__m128>(quarters[0] + quarters[1]);
  }
  _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
  _mm_storeu_ps(to, _mm_add_ps(_mm_add_ps(rows[0], rows[2]), _mm_add_ps(rows[1], rows[3])));
}
#endif

inline int32_t total(const Integers& lanes) {
  return folded<Integers8, Integers4>(lanes, [](const auto& a, const auto& b) { return a + b; });
}

inline float largest(const Lanes& lanes) {
  return folded<Lanes8, Lanes4>(lanes, [](const auto& a, const auto& b) { return a > b ? a : b; });
}

// e^x with a relative error of 2e-7, for x between -87 and 88, to which others are clamped; NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r is a polynomial, and 2^n goes into the exponent (Cephes, expf).
inline Lanes exponential(Lanes x) {
  const Lanes zero = {};
  x = x < -87.0f ? zero - 87.0f : x;
  x = x > 88.0f ? zero + 88.0f : x;
  const Lanes magic = zero + 0x1.8p23f;  // x + magic - magic rounds x to a whole number
  const Lanes n = add_product(magic, x, zero + 1.44269504f) - magic;
  Lanes r = add_product(x, n, zero - 0.693359375f);
  r = add_product(r, n, zero + 2.12194440e-4f);
  Lanes p = zero + 1.9875691500e-4f;
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = add_product(zero + c, p, r);
  p = add_product(r + 1.0f, p, r * r);
  const Integers shift = __builtin_convertvector(x == x ? n : zero, Integers) << 23;
  Integers bits;
  std::memcpy(&bits, &p, sizeof(bits));
  bits += shift;
  std::memcpy(&p, &bits, sizeof(p));
  return x == x ? p : x;
}

// tanh(x) with a relative error of 2e-7 (Cephes, tanhf): a polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere.
inline Lanes hyperbolic_tangent(const Lanes& x) {
  const Lanes zero = {}, squared = x * x;
  Lanes p = zero - 5.70498872745e-3f;
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = add_product(zero + c, p, squared);
  const Lanes near = add_product(x, p * squared, x), far = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
  return squared < 0.390625f ? near : far;
}

// count values of dtype as fp32.
inline void widen_values(const void* from, Dtype dtype, int64_t count, float* to) {
  by_dtype(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(from);
    for (int64_t i = 0; i < count; ++i) to[i] = widen(values[i]);
  });
}

// fp32 values, each rounded to a dtype and back.
template <typename T>
float rounded(float value) {
  return widen(static_cast<T>(value));
}

}  // namespace teal
