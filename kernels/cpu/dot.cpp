// y = x @ W^T for a few rows of x and a weight [N, K] of any float dtype, with sums in fp32.
//
// A sum is kept as LANES partial sums, each over every LANES-th channel. One thread adds them up at the end in a fixed
// order. A row of x then has the same bits alone and beside others, for any number of threads.

#include <algorithm>

#include "matrix.h"

namespace teal {
namespace {

// y[r][c] = dot(x[r], w[c]) for ROWS rows of x, each followed by zeros to whole vectors, and COLUMNS rows of w.
// So many sums at once hide the latency of an addition.
template <typename T, int ROWS, int COLUMNS>
void dot_block(const float* x, const T* w, int64_t stride, int64_t K, float* y, int64_t y_stride) {
  const int64_t whole = K / LANES * LANES, x_stride = padded(K);
  Lanes sums[ROWS][COLUMNS] = {};
  const auto add = [&](int64_t k, const T* weights, int64_t step) {
    Lanes weight[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) weight[c] = load(weights + c * step);
    for (int r = 0; r < ROWS; ++r) {
      const Lanes entries = load(x + r * x_stride + k);
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] = add_product(sums[r][c], entries, weight[c]);
    }
  };
  for (int64_t k = 0; k < whole; k += LANES) {
    // The hardware begins anew with each row, so rows of the block after the next are fetched meanwhile. One Zen 5 core
    // then read 28 to 36 GB/s of bf16. With the next block it was 25 to 27, and 18 to 20 without.
    for (int c = 0; c < COLUMNS; ++c) __builtin_prefetch(w + (2 * COLUMNS + c) * stride + k);
    add(k, w + k, stride);
  }
  if (whole < K) {
    T last[COLUMNS * LANES] = {};
    for (int c = 0; c < COLUMNS; ++c) std::copy(w + c * stride + whole, w + c * stride + K, last + c * LANES);
    add(whole, last, LANES);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) y[r * y_stride + c] = total(sums[r][c]);
}

template <typename T, int ROWS, int COLUMNS>
void dot_rows(const float* x, const Matrix& matrix, int64_t begin, int64_t end, float* y, int64_t y_stride) {
  const int64_t K = matrix.K, stride = matrix.stride;
  const T* w = static_cast<const T*>(matrix.values);
  int64_t n = begin;
  for (; n + COLUMNS <= end; n += COLUMNS)
    dot_block<T, ROWS, COLUMNS>(x, w + n * stride, stride, K, y + n - begin, y_stride);
  for (; n < end; ++n) dot_block<T, ROWS, 1>(x, w + n * stride, stride, K, y + n - begin, y_stride);
}

}  // namespace

void dot(const float* x, int64_t rows, const Matrix& matrix, Dtype dtype, int64_t begin, int64_t end, float* y,
         int64_t y_stride) {
  by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    switch (rows) {
      case 1: return dot_rows<T, 1, 4>(x, matrix, begin, end, y, y_stride);
      case 2: return dot_rows<T, 2, 4>(x, matrix, begin, end, y, y_stride);
      case 3: return dot_rows<T, 3, 4>(x, matrix, begin, end, y, y_stride);
      case 4: return dot_rows<T, 4, 4>(x, matrix, begin, end, y, y_stride);
      case 5: return dot_rows<T, 5, 2>(x, matrix, begin, end, y, y_stride);
      case 6: return dot_rows<T, 6, 2>(x, matrix, begin, end, y, y_stride);
      case 7: return dot_rows<T, 7, 2>(x, matrix, begin, end, y, y_stride);
      default: return dot_rows<T, 8, 2>(x, matrix, begin, end, y, y_stride);
    }
  });
}

}  // namespace teal
