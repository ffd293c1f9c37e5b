#include "product.h"

#include <algorithm>
#include <atomic>

namespace teal {
namespace {

constexpr int64_t PARTIALS = 8192;  // sums of a row that chunks may add to the weight's columns

// Channels of a chunk: all of a wide weight's, else whole groups.
int64_t chunk_channels(const Matrix& matrix) {
  const int64_t groups = (matrix.K + MIN_GROUP - 1) / MIN_GROUP;
  const int64_t chunks = matrix.storage == Storage::BLOCKS ? std::clamp<int64_t>(PARTIALS / matrix.N, 1, groups) : 1;
  return (groups + chunks - 1) / chunks * MIN_GROUP;
}

int64_t chunk_count(const Matrix& matrix) {
  const int64_t channels = chunk_channels(matrix);
  return (matrix.K + channels - 1) / channels;
}

}  // namespace

void Product::use_partials(float* partials, int32_t* finished) {
  partials_ = partials;
  finished_ = finished;
}

int64_t Product::partials_room(const Matrix& matrix) {
  const int64_t chunks = chunk_count(matrix);
  return chunks > 1 ? chunks * matrix.N : 0;
}

float Product::limit(int64_t segment) const {
  return by_dtype(dtype_, [&](auto type) { return rounded<decltype(type)>(work_.matrix->thresholds[segment]); });
}

void Product::use_lists(int32_t* channels, float* values, int64_t room) {
  for (int64_t i = 0; i < LISTS; ++i) kept_[i] = {channels + i * room, values + i * room * GATHER_ROWS, 0, 1};
}

int64_t Product::begin(const Work& work, int64_t rows, int64_t tasks) {
  work_ = work;
  rows_ = rows;
  const Matrix& matrix = *work.matrix;
  for (int64_t first = 0; matrix.gathers() && first < rows; first += GATHER_ROWS) {
    const int64_t here = std::min(GATHER_ROWS, rows - first), stride = padded(matrix.K);
    for (int64_t s = 0; s < matrix.segments; ++s) {
      Kept& list = kept(first, s);
      list.columns = kept_columns(matrix, here);
      compact(work.x + first * stride, stride, here, matrix, limit(s), list);
    }
  }
  chunks_ = chunk_count(matrix);
  const int64_t unit = matrix.unit(), wanted = (tasks + chunks_ - 1) / chunks_;
  const int64_t share = (work.columns + wanted - 1) / wanted;
  block_ = (share + unit - 1) / unit * unit;
  if (chunks_ > 1) std::fill_n(finished_, blocks(), 0);
  return this->tasks();
}

std::pair<int64_t, int64_t> Product::columns(int64_t task) const {
  const int64_t begin = block(task) * block_;
  return {begin, std::min(begin + block_, work_.columns)};
}

void Product::multiply(int64_t task, int64_t begin, int64_t end) {
  if (work_.matrix->storage == Storage::BLOCKS) return multiply_parts(task / blocks(), begin, end);
  if (work_.matrix->gathers()) return gather_columns(begin, end);
  dot(work_.x, rows_, *work_.matrix, dtype_, begin, end, work_.y + begin, work_.y_stride);
}

bool Product::completes(int64_t task) {
  if (chunks_ == 1) return true;
  std::atomic_ref<int32_t> finished(finished_[block(task)]);
  return finished.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks_;
}

void Product::add_up(int64_t begin, int64_t end) {
  if (chunks_ == 1) return;
  const int64_t N = work_.matrix->N;
  for (int64_t r = 0; r < rows_; ++r) {
    std::copy(partials_ + r * N + begin, partials_ + r * N + end, y(r) + begin);
    for (int64_t c = 1; c < chunks_; ++c) {
      const float* partial = partials_ + (c * rows_ + r) * N;
      for (int64_t n = begin; n < end; ++n) y(r)[n] += partial[n];
    }
  }
}

// Where a piece of columns is of one part and one segment.
void Product::multiply_parts(int64_t chunk, int64_t begin, int64_t end) {
  const Matrix& matrix = *work_.matrix;
  const int64_t channels = chunk_channels(matrix), first = chunk * channels, stride = padded(matrix.K);
  const bool whole = chunks_ == 1;
  float* to = whole ? work_.y : partials_ + chunk * rows_ * matrix.N;
  const int64_t to_stride = whole ? work_.y_stride : matrix.N;
  int64_t part = 0, part_begin = 0, segment = 0, segment_end = matrix.segment_sizes[0];
  while (begin < end) {
    while (begin >= segment_end) segment_end += matrix.segment_sizes[++segment];
    while (begin >= part_begin + matrix.parts[part].N) part_begin += matrix.parts[part++].N;
    const int64_t last = std::min({end, segment_end, part_begin + matrix.parts[part].N});
    for (int64_t r = 0; r < rows_; r += GATHER_ROWS) {
      const Entries entries{work_.x + r * stride, stride, std::min(GATHER_ROWS, rows_ - r), limit(segment), first,
                            std::min(first + channels, matrix.K)};
      multiply_blocks(matrix.parts[part], dtype_, entries, begin - part_begin, last - part_begin,
                      to + r * to_stride + begin, to_stride);
    }
    begin = last;
  }
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
