// A product of a step: x [rows, K] times columns of a matrix, in blocks that any thread may take.
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
  void use(int32_t* channels, float* values, int64_t room);

  // List what x keeps, and cut the columns into about so many blocks. Returns how many they are.
  int64_t begin(const Work& work, int64_t rows, int64_t blocks);
  // Columns of a block.
  std::pair<int64_t, int64_t> columns(int64_t index) const;
  // y of columns begin to end, in fp32.
  void multiply(int64_t begin, int64_t end);

  int64_t tasks() const { return (work_.columns + block_ - 1) / block_; }
  float* y(int64_t row) const { return work_.y + row * work_.y_stride; }
  const void* bias() const { return work_.matrix->bias; }

 private:
  void gather_columns(int64_t begin, int64_t end);
  Kept& kept(int64_t first_row, int64_t segment) { return kept_[first_row / GATHER_ROWS * SEGMENTS + segment]; }

  const Dtype dtype_;
  Work work_{};
  int64_t rows_ = 0, block_ = 1;
  Kept kept_[LISTS] = {};
};

}  // namespace teal
