#include "product.h"

#include <algorithm>

namespace teal {

void Product::use(int32_t* channels, float* values, int64_t room) {
  for (int64_t i = 0; i < LISTS; ++i) kept_[i] = {channels + i * room, values + i * room * GATHER_ROWS, 0, 1};
}

int64_t Product::begin(const Work& work, int64_t rows, int64_t blocks) {
  work_ = work;
  rows_ = rows;
  const Matrix& matrix = *work.matrix;
  for (int64_t first = 0; matrix.gathers() && first < rows; first += GATHER_ROWS) {
    const int64_t here = std::min(GATHER_ROWS, rows - first), stride = padded(matrix.K);
    for (int64_t s = 0; s < matrix.segments; ++s) {
      Kept& list = kept(first, s);
      list.columns = kept_columns(matrix, here);
      const float limit = by_dtype(dtype_, [&](auto type) { return rounded<decltype(type)>(matrix.thresholds[s]); });
      compact(work.x + first * stride, stride, here, matrix, limit, list);
    }
  }
  const int64_t unit = matrix.unit(), share = (work.columns + blocks - 1) / blocks;
  block_ = (share + unit - 1) / unit * unit;
  return tasks();
}

std::pair<int64_t, int64_t> Product::columns(int64_t index) const {
  return {index * block_, std::min((index + 1) * block_, work_.columns)};
}

void Product::multiply(int64_t begin, int64_t end) {
  if (work_.matrix->gathers()) return gather_columns(begin, end);
  dot(work_.x, rows_, *work_.matrix, dtype_, begin, end, work_.y + begin, work_.y_stride);
}

// By pieces of at most BLOCK columns, each within a segment.
void Product::gather_columns(int64_t begin, int64_t end) {
  const Matrix& matrix = *work_.matrix;
  int64_t segment = 0, segment_end = matrix.segment_sizes[0];
  while (begin < end) {
    while (begin >= segment_end) segment_end += matrix.segment_sizes[++segment];
    const int64_t width = std::min({BLOCK, end - begin, segment_end - begin});
    for (int64_t first = 0; first < rows_; first += GATHER_ROWS)
      gather(kept(first, segment), matrix, dtype_, std::min(GATHER_ROWS, rows_ - first), begin, width,
             y(first) + begin, work_.y_stride);
    begin += width;
  }
}

}  // namespace teal
