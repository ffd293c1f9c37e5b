// A chunk's scores become weights relative to their own largest one. Partial results are added up in the order of
// positions, each times e^(its largest score - the largest of all) (Dao 2023, FlashDecoding).

#include "attention.h"

#include <algorithm>
#include <cmath>

#include "activations.h"

namespace teal {
namespace {

// Heads that share a read of the cache, and slots and vectors of values in flight at once. Their sums do not wait for
// each other, and take as many registers as there are. 3 heads of 64 over 512 slots took a Xeon core 9 us so, and
// 24 one by one.
constexpr int HEADS = 4;
#if defined(__AVX512F__)
constexpr int SLOTS = 4, VECTORS = 4;
#else
constexpr int SLOTS = 1, VECTORS = 1;
#endif

// Slots of keys fetched ahead of those in use. Cold, the same 512 slots took 21 us without, 16 with 16 or 32.
constexpr int64_t AHEAD = 32;

// scores[h][0..COUNT) = dot(q[h], key) for HEADS_ heads and the keys of COUNT slots, vectors of D values of T.
template <typename T, int HEADS_, int COUNT>
TEAL_INLINE void score(const float* q, const char* k, int64_t slot_stride, int64_t D, float* scores) {
  Lanes sums[HEADS_][COUNT] = {};
  const int64_t whole = D / LANES * LANES, stride = padded(D);
  const auto add = [&](int64_t d, auto&& load_key) {
    Lanes keys[COUNT];
    for (int s = 0; s < COUNT; ++s) keys[s] = load_key(reinterpret_cast<const T*>(k + s * slot_stride) + d);
    for (int h = 0; h < HEADS_; ++h) {
      const Lanes query = load(q + h * stride + d);
      for (int s = 0; s < COUNT; ++s) sums[h][s] = add_product(sums[h][s], query, keys[s]);
    }
  };
  for (int64_t d = 0; d < whole; d += LANES) add(d, [](const T* key) { return load(key); });
  if (whole < D) add(whole, [&](const T* key) { return load_part(key, D - whole); });
  for (int h = 0; h < HEADS_; ++h)
    if constexpr (COUNT == 4)
      totals(sums[h], scores + h * CHUNK);
    else
      for (int s = 0; s < COUNT; ++s) scores[h * CHUNK + s] = total(sums[h][s]);
}

// out[h][0..COUNT * LANES) = sum of weights[h][s] values[s] for HEADS_ heads; values are read by load_value.
template <typename T, int HEADS_, int COUNT, typename Load>
TEAL_INLINE void weigh(const float* weights, const char* v, int64_t slot_stride, int64_t count, Load&& load_value,
                       float* out, int64_t out_stride) {
  Lanes sums[HEADS_][COUNT] = {};
  for (int64_t s = 0; s < count; ++s) {
    Lanes values[COUNT];
    for (int i = 0; i < COUNT; ++i) values[i] = load_value(reinterpret_cast<const T*>(v + s * slot_stride) + i * LANES);
    for (int h = 0; h < HEADS_; ++h) {
      const Lanes weight = Lanes{} + weights[h * CHUNK + s];
      for (int i = 0; i < COUNT; ++i) sums[h][i] = add_product(sums[h][i], values[i], weight);
    }
  }
  for (int h = 0; h < HEADS_; ++h)
    for (int i = 0; i < COUNT; ++i) store(out + h * out_stride + i * LANES, sums[h][i]);
}

// out[h][D] = sum of weights[h][s] values[s] for HEADS_ heads.
template <typename T, int HEADS_>
void weigh_heads(const float* weights, const char* v, int64_t slot_stride, int64_t count, int64_t D, float* out,
                 int64_t out_stride) {
  const auto whole = [](const T* value) { return load(value); };
  int64_t d = 0;
  for (; d + VECTORS * LANES <= D; d += VECTORS * LANES)
    weigh<T, HEADS_, VECTORS>(weights, v + d * sizeof(T), slot_stride, count, whole, out + d, out_stride);
  for (; d + LANES <= D; d += LANES)
    weigh<T, HEADS_, 1>(weights, v + d * sizeof(T), slot_stride, count, whole, out + d, out_stride);
  const auto part = [&](const T* value) { return load_part(value, D - d); };
  if (d < D) weigh<T, HEADS_, 1>(weights, v + d * sizeof(T), slot_stride, count, part, out + d, out_stride);
}

float scale_of(const char* slot, const CacheLayout& layout) {
  float scale;
  std::memcpy(&scale, slot + layout.packed_scale(), sizeof(scale));
  return scale;
}

// scores [count] become weights e^(score - largest), zeros up to whole vectors; their largest and sum.
void soften(float* scores, int64_t count, float* largest_and_sum) {
  std::fill(scores + count, scores + padded(count), scores[0]);
  Lanes mosts = load(scores);
  for (int64_t s = LANES; s < count; s += LANES) mosts = larger(load(scores + s), mosts);
  const float most = largest(mosts);
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
  const auto prefetch = [&](const char* from, int64_t s) {
    for (int64_t i = 0; i < SLOTS * layout.slot_stride; i += 64) __builtin_prefetch(from + s * layout.slot_stride + i);
  };
  int64_t slot = 0;
  for (; slot + SLOTS <= count; slot += SLOTS) {
    prefetch(k, slot + AHEAD);
    prefetch(v, slot);
    score<T, HEADS_, SLOTS>(q, k + slot * layout.slot_stride, layout.slot_stride, D, scores + slot);
  }
  for (; slot < count; ++slot)
    score<T, HEADS_, 1>(q, k + slot * layout.slot_stride, layout.slot_stride, D, scores + slot);
  for (int64_t s = 0; s < count; ++s) {
    const float factor = layout.int8 ? scoring.scale * scale_of(k + s * layout.slot_stride, layout) : scoring.scale;
    for (int h = 0; h < HEADS_; ++h) scores[h * CHUNK + s] *= factor;
  }
  for (int h = 0; h < HEADS_ && scoring.softcap; ++h) cap_softly(scores + h * CHUNK, count, scoring.softcap);
  for (int h = 0; h < HEADS_; ++h) soften(scores + h * CHUNK, count, partial + h * size);
  if (layout.int8)
    for (int64_t s = 0; s < count; ++s) {
      const float factor = scale_of(v + s * layout.slot_stride, layout);
      for (int h = 0; h < HEADS_; ++h) scores[h * CHUNK + s] *= factor;
    }
  weigh_heads<T, HEADS_>(scores, v, layout.slot_stride, count, D, partial + 2, size);
}

// As attend_heads, for so many heads, COUNT at once.
template <typename T, int COUNT>
void attend_typed(const float* q, int64_t heads, const char* k, const char* v, const CacheLayout& layout,
                  const Scoring& scoring, int64_t count, float* partial) {
  const int64_t D = layout.head_dim;
  for (; heads >= COUNT; heads -= COUNT, q += COUNT * padded(D), partial += COUNT * partial_size(D))
    attend_heads<T, COUNT>(q, k, v, layout, scoring, count, partial);
  if constexpr (COUNT > 1) attend_typed<T, COUNT - 1>(q, heads, k, v, layout, scoring, count, partial);
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
  if (layout.int8) return attend_typed<int8_t, HEADS>(q, heads, k, v, layout, scoring, count, partial);
  by_dtype(layout.dtype, [&](auto type) {
    attend_typed<decltype(type), HEADS>(q, heads, k, v, layout, scoring, count, partial);
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
