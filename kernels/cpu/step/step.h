// A decode step as the caller describes it. launch.py mirrors these structs, field by field.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace teal {

constexpr int64_t STEP_ROWS = 8;

struct Layer {
  Matrix qkv, o, gate_up, down;
  const void *attention_norm, *ffn_norm;  // [C] of the model's dtype
  const void *q_norm, *k_norm;            // [D] of it, or null
  int64_t window;                         // of attention, in tokens; 0: all
};

// A vector of C values for each of V tokens.
struct Embedding {
  const void* values;   // [V, C] of the model's dtype, or int8
  const void* scales;   // [V, C / group] of the model's dtype, or null
  const Blocks* blocks;  // a weight [C, V] instead, or null
  int64_t group;
};

struct Model {
  const Layer* layers;
  Embedding embedding;
  const void* norm;            // [C], the last one
  const float* frequencies;    // [D / 2]: rotation per position, radians
  Matrix head;
  int64_t layer_count, vocabulary, hidden, intermediate, heads, kv_heads, head_dim;
  float eps, attention_scale;
  Dtype dtype;
  int32_t int8_cache;  // keys and values as kv_int8.py lays them out
};

// One token for each of so many rows, contiguous. What is not wanted is null.
struct Call {
  int64_t rows;
  int64_t* tokens;     // [rows]; with choose each becomes its row's argmax
  int64_t* positions;  // [rows]; with choose each grows by one
  char *k, *v;         // [layers, rows, kv_heads, slots, head_dim or packed width]
  int64_t layer_stride, row_stride, head_stride, slot_stride, slots;  // strides in bytes
  const float* hidden_in;  // [rows, C]: what the last block gave, if only the head is to run
  float* hidden_out;       // [rows, C]
  float* logits;           // [rows, V]
  int64_t choose;
};

enum class Outcome : int32_t { DONE, UNKNOWN_TOKEN, NO_SLOT, NO_MEMORY };

}  // namespace teal
