// Attention of one row's query heads over a part of its keys and values.
#pragma once

#include <cstdint>

#include "../floats.h"

namespace teal {

// Positions that one task attends to: whole multiples of it, so that where a sum is cut depends on positions alone.
constexpr int64_t CHUNK = 256;

// How a key or value lies in the cache: floats of dtype, or bytes (kv_int8.py), in vectors slot_stride bytes apart.
struct CacheLayout {
  Dtype dtype;
  bool int8;
  int64_t head_dim, slot_stride;

  int64_t packed_scale() const { return padded(head_dim); }  // where an int8 vector's scale stands
};

// How a product q k becomes a score: times scale, then capped softly unless softcap is 0.
struct Scoring {
  float scale, softcap;
};

// Floats of a partial result: the largest score, the sum of weights, and the weighted sum of values.
inline int64_t partial_size(int64_t head_dim) { return padded(head_dim) + 2; }

// Put a vector [D], whose values are rounded to the dtype, into a slot of the cache.
void write_slot(const float* vector, const CacheLayout& layout, char* slot);

// partial[head] of softmax(scores of q k^T) v for heads q [heads, padded(D)] over slots begin to end, at most CHUNK.
void attend(const float* q, int64_t heads, const char* k, const char* v, const CacheLayout& layout,
            const Scoring& scoring, int64_t begin, int64_t end, float* partial);

// out [D] of the partial results of a head, which lie stride floats apart.
void combine(const float* partial, int64_t count, int64_t stride, int64_t head_dim, float* out);

}  // namespace teal
