// A product of a step: x [rows, K] times columns of a matrix, in blocks that any thread may take.
//
// Blocks of columns of a narrow weight are short pieces of its rows, which memory delivers slowly. Where integers are
// GGUF's blocks, such a weight is cut along its channels, too. Partial sums of a block are added up in the order of
// chunks by whoever has finished the last one. How channels are cut depends on the weight alone.
#pragma once

#include <cstdint>
#include <utility>

#include "step.h"

namespace teal {

class Product {
 public:
  static constexpr int64_t GROUPS = (STEP_ROWS + GATHER_ROWS - 1) / GATHER_ROWS;  // of rows gathered together
  static constexpr int64_t LISTS = GROUPS * SEGMENTS;                             // of kept channels

  struct Work {
    const Matrix* matrix;
    const float* x;  // [rows, padded(K)]
    float* y;        // [rows, y_stride]
    int64_t y_stride, columns;
  };

  explicit Product(Dtype dtype) : dtype_(dtype) {}

  // Memory for LISTS lists of so many channels, with GATHER_ROWS values each.
  void use_lists(int32_t* channels, float* values, int64_t room);
  // Memory for partial sums, partials_room(matrix) for each row, and for a count for each of a product's blocks.
  void use_partials(float* partials, int32_t* finished);
  static int64_t partials_room(const Matrix& matrix);

  // List what x keeps, and cut the product into about so many tasks. Returns how many they are.
  int64_t begin(const Work& work, int64_t rows, int64_t tasks);
  int64_t tasks() const { return chunks_ * blocks(); }
  int64_t blocks() const { return (work_.columns + block_ - 1) / block_; }
  int64_t block(int64_t task) const { return task % blocks(); }
  // Columns of a task's block.
  std::pair<int64_t, int64_t> columns(int64_t task) const;
  // A task's part of y for columns begin to end, in fp32.
  void multiply(int64_t task, int64_t begin, int64_t end);
  // Whether a task that has multiplied was the last one of its block: y is then to be added up.
  bool completes(int64_t task);
  void add_up(int64_t begin, int64_t end);

  float* y(int64_t row) const { return work_.y + row * work_.y_stride; }
  const void* bias() const { return work_.matrix->bias; }

 private:
  void gather_columns(int64_t begin, int64_t end);
  void multiply_parts(int64_t chunk, int64_t begin, int64_t end);
  float limit(int64_t segment) const;
  Kept& kept(int64_t first_row, int64_t segment) { return kept_[first_row / GATHER_ROWS * SEGMENTS + segment]; }

  const Dtype dtype_;
  Work work_{};
  int64_t rows_ = 0, block_ = 1;  // block_: columns
  int64_t chunks_ = 1;            // of channels
  float* partials_ = nullptr;     // [chunks, rows, N]
  int32_t* finished_ = nullptr;   // chunks of each block
  Kept kept_[LISTS] = {};
};

}  // namespace teal
