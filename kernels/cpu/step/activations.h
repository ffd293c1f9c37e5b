// What a block does between its products, on fp32 arrays whose values are rounded to the model's dtype T where model.py
// rounds them.
#pragma once

#include <cmath>
#include <cstdint>

#include "../floats.h"
#include "step.h"

namespace teal {

inline void zero_tail(float* row, int64_t count) {
  for (int64_t i = count; i < padded(count); ++i) row[i] = 0.0f;
}

// out = x / rms(x) * weight over count values.
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
}

// out = (x - mean) / deviation * weight + bias over count values.
template <typename T>
void layer_norm(const float* x, const Norm& norm, int64_t count, float eps, float* out) {
  const T *w = static_cast<const T*>(norm.weight), *b = static_cast<const T*>(norm.bias);
  const int64_t whole = count / LANES * LANES;
  Lanes sums = load_part(x + whole, count - whole);
  for (int64_t i = 0; i < whole; i += LANES) sums += load(x + i);
  const float mean = total(sums) / static_cast<float>(count);
  Lanes squares = {};
  for (int64_t i = 0; i < whole; i += LANES) {
    const Lanes apart = load(x + i) - mean;
    squares = add_product(squares, apart, apart);
  }
  float square = total(squares);
  for (int64_t i = whole; i < count; ++i) square = add_product(square, x[i] - mean, x[i] - mean);
  const float scale = 1.0f / std::sqrt(square / static_cast<float>(count) + eps);
  for (int64_t i = 0; i < count; ++i) out[i] = rounded<T>(add_product(widen(b[i]), (x[i] - mean) * scale, widen(w[i])));
}

// out = norm(x) over count values, and zeros up to whole vectors.
template <typename T>
void normalize(const float* x, const Norm& norm, int64_t count, float eps, float* out) {
  if (norm.weight == nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = rounded<T>(x[i]);
  } else if (norm.bias == nullptr) {
    rms_norm<T>(x, norm.weight, count, eps, out);
  } else {
    layer_norm<T>(x, norm, count, eps, out);
  }
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

constexpr auto silu = [](const Lanes& x) { return x / (exponential(-x) + 1.0f); };

// x / 2 (1 + tanh(u)) = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016, section 2).
constexpr auto gelu_tanh = [](const Lanes& x) {
  const Lanes one = Lanes{} + 1.0f, cubic = add_product(one, x * x, Lanes{} + 0.044715f);
  return x / (exponential(x * cubic * -1.5957691216f) + 1.0f);
};

// out = activation(gate) * up, each factor rounded.
template <typename T, typename F>
void gated_by(F&& activation, const float* gate, const float* up, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t here = count - i < LANES ? count - i : LANES;
    const Lanes activated = activation(here == LANES ? load(gate + i) : load_part(gate + i, here));
    for (int64_t j = 0; j < here; ++j) out[i + j] = rounded<T>(rounded<T>(activated[j]) * up[i + j]);
  }
}

template <typename T>
void gated(Activation activation, const float* gate, const float* up, int64_t count, float* out) {
  switch (activation) {
    case Activation::SILU: return gated_by<T>(silu, gate, up, count, out);
    case Activation::GELU_TANH: return gated_by<T>(gelu_tanh, gate, up, count, out);
  }
}

// x = cap tanh(x / cap), for count values.
inline void cap_softly(float* x, int64_t count, float cap) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t here = count - i < LANES ? count - i : LANES;
    const Lanes values = here == LANES ? load(x + i) : load_part(x + i, here);
    const Lanes capped = hyperbolic_tangent(values / cap) * cap;
    std::memcpy(x + i, &capped, here * sizeof(float));
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
