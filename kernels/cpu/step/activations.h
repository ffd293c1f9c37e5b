// What a block does between its products, on fp32 arrays whose values are rounded to the model's dtype T where model.py
// rounds them.
#pragma once

#include <cmath>
#include <cstdint>

#include "../floats.h"

namespace teal {

inline void zero_tail(float* row, int64_t count) {
  for (int64_t i = count; i < padded(count); ++i) row[i] = 0.0f;
}

// out = x / rms(x) * weight over count values, and zeros up to whole vectors.
template <typename T>
void rms_norm(const float* x, const void* weight, int64_t count, float eps, float* out) {
  const T* w = static_cast<const T*>(weight);
  const int64_t whole = count / LANES * LANES;
  Lanes squares = {};
  for (int64_t i = 0; i < whole; i += LANES) squares = add_product(squares, load(x + i), load(x + i));
  const Lanes last = load_part(x + whole, count - whole);
  squares = add_product(squares, last, last);
  const float scale = 1.0f / std::sqrt(total(squares) / static_cast<float>(count) + eps);
  for (int64_t i = 0; i < count; ++i) out[i] = rounded<T>(rounded<T>(x[i] * scale) * widen(w[i]));
  zero_tail(out, count);
}

// Rotate a head by the angles whose cos and sin are given [D / 2]; channel i pairs with i + D/2.
template <typename T>
void rotate(const float* head, const float* cos, const float* sin, int64_t D, float* out) {
  const int64_t half = D / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    out[i] = rounded<T>(a * cos[i] - b * sin[i]);
    out[i + half] = rounded<T>(b * cos[i] + a * sin[i]);
  }
  zero_tail(out, D);
}

// out = silu(gate) * up, each factor rounded.
template <typename T>
void silu_product(const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t here = count - i < LANES ? count - i : LANES;
    const Lanes g = here == LANES ? load(gate + i) : load_part(gate + i, here);
    const Lanes activated = g / (exponential(-g) + 1.0f);
    for (int64_t j = 0; j < here; ++j) out[i + j] = rounded<T>(rounded<T>(activated[j]) * up[i + j]);
  }
}

// y rounded, and rounded again with a bias added, as a module does it.
template <typename T>
void round_and_add(float* y, const void* bias, int64_t begin, int64_t count) {
  for (int64_t n = 0; n < count; ++n) y[n] = rounded<T>(y[n]);
  if (bias == nullptr) return;
  const T* b = static_cast<const T*>(bias) + begin;
  for (int64_t n = 0; n < count; ++n) y[n] = rounded<T>(y[n] + widen(b[n]));
}

}  // namespace teal
