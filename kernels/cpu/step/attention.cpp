// A chunk's scores become weights relative to their own largest one. Partial results are added up in the order of
// positions, each times e^(its largest score - the largest of all) (Dao 2023, FlashDecoding).

#include "attention.h"

#include <algorithm>
#include <cmath>

#include "activations.h"

namespace teal {
namespace {

constexpr int64_t HEADS = 4;  // heads that share a read of the cache

// dot(q[h], key) for HEADS_ heads over a vector of D values of T.
template <typename T, int HEADS_>
void score(const float* q, const T* key, int64_t D, float* scores) {
  Lanes sums[HEADS_] = {};
  const int64_t whole = D / LANES * LANES, stride = padded(D);
  const auto add = [&](int64_t d, const Lanes& values) {
    for (int h = 0; h < HEADS_; ++h) sums[h] = add_product(sums[h], load(q + h * stride + d), values);
  };
  for (int64_t d = 0; d < whole; d += LANES) add(d, load(key + d));
  if (whole < D) add(whole, load_part(key + whole, D - whole));
  for (int h = 0; h < HEADS_; ++h) scores[h * CHUNK] = total(sums[h]);
}

// out[h][D] = sum of weights[h][s] values[s] for HEADS_ heads.
template <typename T, int HEADS_>
void weigh(const float* weights, const char* v, int64_t slot_stride, int64_t count, int64_t D, float* out,
           int64_t out_stride) {
  for (int64_t d = 0; d < D; d += LANES) {
    Lanes sums[HEADS_] = {};
    const int64_t here = std::min(LANES, D - d);
    for (int64_t s = 0; s < count; ++s) {
      const T* value = reinterpret_cast<const T*>(v + s * slot_stride) + d;
      const Lanes values = here == LANES ? load(value) : load_part(value, here);
      for (int h = 0; h < HEADS_; ++h) sums[h] = add_product(sums[h], values, Lanes{} + weights[h * CHUNK + s]);
    }
    for (int h = 0; h < HEADS_; ++h) store(out + h * out_stride + d, sums[h]);
  }
}

float scale_of(const char* slot, const CacheLayout& layout) {
  float scale;
  std::memcpy(&scale, slot + layout.packed_scale(), sizeof(scale));
  return scale;
}

// scores [count] become weights e^(score - largest), zeros up to whole vectors; their largest and sum.
void soften(float* scores, int64_t count, float* largest_and_sum) {
  float most = scores[0];
  for (int64_t s = 1; s < count; ++s) most = scores[s] > most ? scores[s] : most;
  std::fill(scores + count, scores + padded(count), 0.0f);
  Lanes sums = {};
  for (int64_t s = 0; s < count; s += LANES) {
    Lanes weights = exponential(load(scores + s) - most);
    for (int64_t i = count - s; i < LANES; ++i) weights[i] = 0.0f;
    sums += weights;
    store(scores + s, weights);
  }
  largest_and_sum[0] = most;
  largest_and_sum[1] = total(sums);
}

template <typename T, int HEADS_>
void attend_heads(const float* q, const char* k, const char* v, const CacheLayout& layout, const Scoring& scoring,
                  int64_t count, float* partial) {
  alignas(64) float scores[HEADS_ * CHUNK];
  const int64_t D = layout.head_dim, size = partial_size(D);
  for (int64_t s = 0; s < count; ++s) {
    const char* slot = k + s * layout.slot_stride;
    score<T, HEADS_>(q, reinterpret_cast<const T*>(slot), D, scores + s);
    const float factor = layout.int8 ? scoring.scale * scale_of(slot, layout) : scoring.scale;
    for (int h = 0; h < HEADS_; ++h) scores[h * CHUNK + s] *= factor;
  }
  for (int h = 0; h < HEADS_ && scoring.softcap; ++h) cap_softly(scores + h * CHUNK, count, scoring.softcap);
  for (int h = 0; h < HEADS_; ++h) soften(scores + h * CHUNK, count, partial + h * size);
  if (layout.int8)
    for (int64_t s = 0; s < count; ++s) {
      const float factor = scale_of(v + s * layout.slot_stride, layout);
      for (int h = 0; h < HEADS_; ++h) scores[h * CHUNK + s] *= factor;
    }
  weigh<T, HEADS_>(scores, v, layout.slot_stride, count, D, partial + 2, size);
}

template <typename T>
void attend_typed(const float* q, int64_t heads, const char* k, const char* v, const CacheLayout& layout,
                  const Scoring& scoring, int64_t count, float* partial) {
  const int64_t stride = padded(layout.head_dim), size = partial_size(layout.head_dim);
  int64_t h = 0;
  for (; h + HEADS <= heads; h += HEADS)
    attend_heads<T, HEADS>(q + h * stride, k, v, layout, scoring, count, partial + h * size);
  for (; h < heads; ++h) attend_heads<T, 1>(q + h * stride, k, v, layout, scoring, count, partial + h * size);
}

void write_bytes(const float* vector, const CacheLayout& layout, char* slot) {
  float most = 0.0f;
  bool is_number = true;
  for (int64_t d = 0; d < layout.head_dim; ++d) {
    most = std::max(most, std::fabs(vector[d]));
    is_number &= vector[d] == vector[d];
  }
  float scale = is_number ? most / 127.0f : std::nanf("");
  for (int64_t d = 0; d < layout.head_dim; ++d) {
    const float value = vector[d] / scale;  // 0 / 0 where all is zero
    slot[d] = static_cast<int8_t>(std::isfinite(value) ? std::nearbyint(value) : 0.0f);
  }
  if (std::isinf(scale)) scale = std::nanf("");
  std::memcpy(slot + layout.packed_scale(), &scale, sizeof(scale));
}

}  // namespace

void write_slot(const float* vector, const CacheLayout& layout, char* slot) {
  if (layout.int8) return write_bytes(vector, layout, slot);
  by_dtype(layout.dtype, [&](auto type) {
    using T = decltype(type);
    T* to = reinterpret_cast<T*>(slot);
    for (int64_t d = 0; d < layout.head_dim; ++d) to[d] = static_cast<T>(vector[d]);
  });
}

void attend(const float* q, int64_t heads, const char* k, const char* v, const CacheLayout& layout,
            const Scoring& scoring, int64_t begin, int64_t end, float* partial) {
  k += begin * layout.slot_stride;
  v += begin * layout.slot_stride;
  const int64_t count = end - begin;
  if (layout.int8) return attend_typed<int8_t>(q, heads, k, v, layout, scoring, count, partial);
  by_dtype(layout.dtype, [&](auto type) {
    attend_typed<decltype(type)>(q, heads, k, v, layout, scoring, count, partial);
  });
}

void combine(const float* partial, int64_t count, int64_t stride, int64_t head_dim, float* out) {
  float most = partial[0], sum = 0.0f;
  for (int64_t c = 1; c < count; ++c) most = std::max(most, partial[c * stride]);
  std::fill(out, out + head_dim, 0.0f);
  for (int64_t c = 0; c < count; ++c) {
    const float* part = partial + c * stride;
    const float weight = std::exp(part[0] - most);
    sum = add_product(sum, weight, part[1]);
    for (int64_t d = 0; d < head_dim; ++d) out[d] = add_product(out[d], weight, part[2 + d]);
  }
  for (int64_t d = 0; d < head_dim; ++d) out[d] /= sum;
}

}  // namespace teal
