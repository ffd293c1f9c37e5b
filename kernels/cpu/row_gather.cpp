// The op of gather.cpp: y = x @ W over kept entries of x only. Compiled at first use by native.py; sparse_linear.py
// describes the op and checks its arguments.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "matrix.h"
#include "tensors.h"

namespace teal {
namespace {

// The weight of these tensors, [K + E, N].
Matrix matrix_of(const at::Tensor& weight, int64_t K, int64_t N, const std::optional<at::Tensor>& scales,
                 const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& refined) {
  Matrix matrix{};
  matrix.values = weight.const_data_ptr();
  matrix.K = K;
  matrix.N = N;
  matrix.stride = weight.stride(0);
  matrix.group = 1;
  matrix.storage = !scales ? Storage::INPUT_MAJOR : zeros ? Storage::INT4 : Storage::INT8;
  if (scales) {
    const bool by_input = scales->size(1) == N;
    matrix.scales = scales->const_data_ptr();
    matrix.zeros = zeros ? zeros->const_data_ptr<uint8_t>() : nullptr;
    matrix.group = by_input ? LINE : N / scales->size(1);
    matrix.group_channels = by_input ? weight.size(0) / scales->size(0) : 0;
    const int64_t group = matrix.group;
    TORCH_CHECK_VALUE(group == 32 || group == 64 || group == 128, "groups: expected 32, 64 or 128 to one");
  }
  if (refined) {
    matrix.refined = refined->const_data_ptr<int32_t>();
    matrix.E = refined->numel();
    for (int64_t j = 0; j < matrix.E; ++j)
      TORCH_CHECK_VALUE(matrix.refined[j] >= 0 && matrix.refined[j] < K, "refined channel ", matrix.refined[j],
                        ": expected 0 to ", K - 1);
  }
  return matrix;
}

// The channels that rows of x keep for a segment, and the memory of the list.
struct Listed {
  std::vector<int32_t> channels;
  std::vector<float> values;
  Kept kept;

  Listed(const float* x, int64_t rows, const Matrix& matrix, float limit) {
    const int64_t room = Kept::room(matrix.K, matrix.E), columns = kept_columns(matrix, rows);
    channels.resize(room);
    values.resize(room * columns);
    kept = {channels.data(), values.data(), 0, columns};
    compact(x, matrix.K, rows, matrix, limit, kept);
  }
};

void run(const float* x, int64_t rows, const Matrix& matrix, Dtype dtype, const float* limits,
         at::IntArrayRef segments, at::Tensor& y) {
  const int64_t N = matrix.N, unit = matrix.unit();
  const int64_t share = (N + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t block = std::clamp((share + unit - 1) / unit * unit, unit, BLOCK);
  std::vector<Listed> listed;
  listed.reserve(segments.size());
  std::vector<std::pair<int64_t, int64_t>> tasks;  // (segment, first column)
  std::vector<int64_t> ends;
  int64_t column = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    const float limit = by_dtype(dtype, [&](auto type) { return rounded<decltype(type)>(limits[s]); });
    listed.emplace_back(x, rows, matrix, limit);
    for (int64_t begin = column; begin < column + segments[s]; begin += block) tasks.emplace_back(s, begin);
    column += segments[s];
    ends.push_back(column);
  }
  const Dtype out = dtype_of(y.scalar_type());
  at::parallel_for(0, tasks.size(), 1, [&](int64_t first, int64_t last) {
    alignas(64) float sums[GATHER_ROWS * BLOCK];
    for (int64_t t = first; t < last; ++t) {
      const auto [s, begin] = tasks[t];
      const int64_t width = std::min(block, ends[s] - begin);
      gather(listed[s].kept, matrix, dtype, rows, begin, width, sums, BLOCK);
      by_dtype(out, [&](auto type) {
        using T = decltype(type);
        T* to = static_cast<T*>(y.mutable_data_ptr()) + begin;
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t n = 0; n < width; ++n) to[r * N + n] = static_cast<T>(sums[r * BLOCK + n]);
      });
    }
  });
}

at::Tensor row_gather(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& thresholds,
                      at::IntArrayRef segments, const std::optional<at::Tensor>& scales,
                      const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& refined,
                      std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType out = out_dtype.value_or(x.scalar_type());
  const Dtype dtype = dtype_of(x.scalar_type());
  TORCH_CHECK_VALUE(out == at::kFloat || out == x.scalar_type(), "out_dtype ", out, ": expected fp32 or x's");
  TORCH_CHECK_VALUE(x.size(0) <= GATHER_ROWS && x.is_contiguous(), "x: expected few, contiguous rows");
  const bool contiguous =
      !scales || (weight.is_contiguous() && scales->is_contiguous() && (!zeros || zeros->is_contiguous()));
  TORCH_CHECK_VALUE(contiguous, "a quantized weight must be contiguous");
  TORCH_CHECK_VALUE(!refined || (refined->is_contiguous() && weight.size(0) == x.size(1) + refined->numel()),
                    "refined: expected contiguous, with a row of the weight for each");
  const int64_t N = std::accumulate(segments.begin(), segments.end(), int64_t{0});
  const Matrix matrix = matrix_of(weight, x.size(1), N, scales, zeros, refined);
  at::Tensor y = at::empty({x.size(0), N}, x.options().dtype(out));
  std::vector<float> wide(x.numel());
  widen_values(x.const_data_ptr(), dtype, x.numel(), wide.data());
  run(wide.data(), x.size(0), matrix, dtype, thresholds.const_data_ptr<float>(), segments, y);
  return y;
}

}  // namespace
}  // namespace teal

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def(
      "row_gather(Tensor x, Tensor weight, Tensor thresholds, int[] segments, Tensor? scales, Tensor? zeros, "
      "Tensor? refined=None, ScalarType? out_dtype=None) -> Tensor");
  library.impl("row_gather", c10::DispatchKey::CPU, teal::row_gather);
}
