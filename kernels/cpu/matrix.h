// A weight as the products read it, and its products with a few rows of x: gather.cpp and dot.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "blocks.h"
#include "floats.h"

namespace teal {

constexpr int64_t GATHER_ROWS = 4;  // rows of x that a gather serves at once; with more, every channel is kept
constexpr int64_t DOT_ROWS = 8;
constexpr int64_t BLOCK = 512;  // most columns that are summed at once: their sums stay in L1
constexpr int64_t LINE = 32;    // blocks are multiples of this: whole cache lines of 16-bit weights
constexpr int64_t UNROLL = 4;   // weight rows in flight at once: hides memory latency, saves traffic of sums
constexpr int64_t SEGMENTS = 3;

// How a weight is stored. packing.py describes those of integers.
enum class Storage : int32_t {
  INPUT_MAJOR,   // floats [K, N]: a channel that is not read skips a row
  OUTPUT_MAJOR,  // floats [N, K], as nn.Linear has them: each output is a dot product
  INT8,          // [K, N]
  INT4,          // [K + E, N / 8] words, with zero points
  BLOCKS,        // parts side by side, each as blocks.py lays out one of GGUF's types
};

// A weight [K, N]. step/launch.py mirrors this struct, field by field.
struct Matrix {
  const void* values;
  const void* scales;       // of the model's dtype
  const uint8_t* zeros;
  const int32_t* refined;   // [E]: the channels that rows from K on belong to
  const void* bias;         // [N] of the model's dtype, or null
  const float* thresholds;  // of each segment
  int64_t K, N, E;
  int64_t stride;         // values from one row to the next
  int64_t group;          // columns to a scale, or those packed together, if groups lie along the input
  int64_t group_channels;  // channels to a scale, if groups lie along the input; else 0
  int64_t segments, segment_sizes[SEGMENTS];
  const Blocks* parts;
  int64_t part_count;
  Storage storage;
  int32_t padding;

  bool gathers() const { return storage != Storage::OUTPUT_MAJOR && storage != Storage::BLOCKS; }
  int64_t unit() const { return std::max(group, LINE); }  // columns come in multiples of this
};

// The channels that some row of x keeps, in the caller's memory.
struct Kept {
  int32_t* channels;  // rows of the weight: a channel, or K + j, which refines channel refined[j]
  float* values;      // [count][columns]: an entry for each row of x, 0 where it drops the channel
  int64_t count;
  int64_t columns;

  static int64_t room(int64_t K, int64_t E) { return K + E + 2 * LANES; }  // of channels
};

// How many entries a kept channel has for rows of x: the loops of integers know 1 and GATHER_ROWS.
inline int64_t kept_columns(const Matrix& matrix, int64_t rows) {
  return rows == 1 || matrix.storage == Storage::INPUT_MAJOR ? rows : GATHER_ROWS;
}

// Channels channel + k and entries x[k] < K that |x| < limit does not drop, NaN among them; returns how many. Both have
// room for LANES more.
int64_t compact_row(const float* x, int64_t K, int32_t channel, float limit, int32_t* channels, float* values);

// List the entries of x [rows, K] whose size reaches limit, NaN among them. kept.columns is set before.
void compact(const float* x, int64_t stride, int64_t rows, const Matrix& matrix, float limit, Kept& kept);

// y[r][0..width) of rows of x times the matrix's columns from begin on, at most BLOCK, summed in fp32 in channel order.
// A column's sum has the same bits in any block. width is a multiple of the matrix's unit, if it is of integers.
void gather(const Kept& kept, const Matrix& matrix, Dtype dtype, int64_t rows, int64_t begin, int64_t width, float* y,
            int64_t y_stride);

// y[r][0..end - begin) for the rows [N, K] of an OUTPUT_MAJOR matrix. x [rows, padded(K)] ends in zeros.
void dot(const float* x, int64_t rows, const Matrix& matrix, Dtype dtype, int64_t begin, int64_t end, float* y,
         int64_t y_stride);

}  // namespace teal
