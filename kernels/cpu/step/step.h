// A decode step as the caller describes it. launch.py mirrors these structs, field by field.
#pragma once

#include <cstdint>

#include "../matrix.h"

namespace teal {

constexpr int64_t STEP_ROWS = 8;

// A norm with a weight [C] and a bias [C] of the model's dtype. Without a bias it is an RMS norm; without a weight it
// leaves a vector as it is.
struct Norm {
  const void *weight, *bias;
};

// Block of model.py.
struct Layer {
  Matrix qkv, o, gate_up, down;
  Norm attention_norm, attention_end, ffn_norm, ffn_end;
  const void *q_norm, *k_norm;  // RMS norms, see Model::heads_normed_together; or null
  int64_t window;               // of attention, in tokens; 0: all
  int64_t rotation;             // which of the model's its heads have
};

// A vector of C values for each of V tokens.
struct Embedding {
  const void* values;   // [V, C] of the model's dtype, or int8
  const void* scales;   // [V, C / group] of the model's dtype, or null
  const Blocks* blocks;  // a weight [C, V] instead, or null
  int64_t group;
};

enum class Activation : int32_t { SILU, GELU_TANH };

struct Model {
  const Layer* layers;
  Embedding embedding;
  Norm norm;               // the last one
  const float* rotations;  // [rotation_count, 2, D / 2]: turn per position in radians, and a factor of its cos and sin
  Matrix head;
  int64_t layer_count, vocabulary, hidden, intermediate, heads, kv_heads, head_dim, rotation_count;
  float eps, attention_scale, embedding_scale;
  float attention_softcap, logit_softcap;  // capped() of model.py; 0: none
  Activation activation;
  Dtype dtype;
  int32_t int8_cache;             // keys and values as kv_int8.py lays them out
  int32_t heads_normed_together;  // q_norm is [H D] and k_norm [K D]; otherwise each is [D], for every head by itself
  int32_t padding;
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
