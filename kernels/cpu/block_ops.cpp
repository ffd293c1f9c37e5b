// The ops of blocks.cpp and widen_blocks.cpp; block_linear.py describes them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "matrix.h"
#include "tensors.h"

namespace teal {
namespace {

at::Tensor block_product(const at::Tensor& x, const at::Tensor& data, at::IntArrayRef type, int64_t N,
                         double threshold) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.is_contiguous(), "x: expected contiguous rows");
  const int64_t rows = x.size(0), K = x.size(1);
  const Blocks weight = blocks_of(data, type, K, N);
  const Dtype dtype = dtype_of(x.scalar_type());
  const float limit = by_dtype(dtype, [&](auto t) { return rounded<decltype(t)>(static_cast<float>(threshold)); });
  std::vector<float> wide(x.numel());
  widen_values(x.const_data_ptr(), dtype, x.numel(), wide.data());
  at::Tensor y = at::empty({rows, N}, x.options().dtype(at::kFloat));
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, weight.columns() / STRIP, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = first * STRIP, end = std::min(N, last * STRIP);
    for (int64_t r = 0; r < rows; r += GATHER_ROWS) {
      const Entries entries{wide.data() + r * K, K, std::min(GATHER_ROWS, rows - r), limit, 0, K};
      multiply_blocks(weight, dtype, entries, begin, end, to + r * N + begin, N);
    }
  });
  return y;
}

void block_floats(const at::Tensor& data, at::IntArrayRef type, int64_t N, int64_t begin, at::Tensor& out) {
  TORCH_CHECK_VALUE(out.dim() == 2 && out.stride(1) == 1, "out: its rows must be contiguous");
  const int64_t K = out.size(0), end = begin + out.size(1);
  TORCH_CHECK_VALUE(begin % STRIP == 0 && begin >= 0 && end <= N, "begin: expected a strip of the weight");
  const Blocks weight = blocks_of(data, type, K, N);
  const Dtype dtype = dtype_of(out.scalar_type());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t stride = out.stride(0), row_bytes = stride * out.element_size();
  at::parallel_for(0, K / MIN_GROUP, 1, [&](int64_t first, int64_t last) {
    widen_blocks(weight, dtype, first * MIN_GROUP, last * MIN_GROUP, begin, end, to + first * MIN_GROUP * row_bytes,
                 stride);
  });
}

at::Tensor block_columns(const at::Tensor& data, at::IntArrayRef type, int64_t K, int64_t N, const at::Tensor& chosen) {
  const Blocks weight = blocks_of(data, type, K, N);
  const at::Tensor columns = chosen.contiguous();
  const int64_t* numbers = columns.const_data_ptr<int64_t>();
  const int64_t count = columns.numel();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_VALUE(numbers[i] >= 0 && numbers[i] < N, "column ", numbers[i], ": expected 0 to ", N - 1);
  at::Tensor found = at::empty({count, K}, data.options().dtype(at::kFloat));
  float* to = found.mutable_data_ptr<float>();
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) widen_column(weight, numbers[i], to + i * K);
  });
  return found;
}

}  // namespace
}  // namespace teal

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def("block_product(Tensor x, Tensor data, int[] type, int N, float threshold) -> Tensor");
  library.impl("block_product", c10::DispatchKey::CPU, teal::block_product);
  library.def("block_floats(Tensor data, int[] type, int N, int begin, Tensor(a!) out) -> ()");
  library.impl("block_floats", c10::DispatchKey::CPU, teal::block_floats);
  library.def("block_columns(Tensor data, int[] type, int K, int N, Tensor chosen) -> Tensor");
  library.impl("block_columns", c10::DispatchKey::CPU, teal::block_columns);
}
