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

Blocks blocks_of(const at::Tensor& data, at::IntArrayRef type, int64_t K, int64_t N) {
  TORCH_CHECK_VALUE(data.scalar_type() == at::kByte && data.is_contiguous(), "data: expected contiguous bytes");
  TORCH_CHECK_VALUE(type.size() == 5, "type: expected five numbers");
  Blocks w{data.const_data_ptr<uint8_t>(), K, N, 0, 0, 0, 0, 0, 0};
  int32_t* fields[] = {&w.bits, &w.offset, &w.group, &w.has_minima, &w.nested};
  for (size_t i = 0; i < 5; ++i) *fields[i] = static_cast<int32_t>(type[i]);
  return w;
}

at::Tensor block_product(const at::Tensor& x, const at::Tensor& data, at::IntArrayRef type, int64_t N, double threshold) {
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

void block_floats(at::TensorList data, at::IntArrayRef types, at::IntArrayRef widths, at::Tensor& out) {
  TORCH_CHECK_VALUE(out.dim() == 2 && out.stride(1) == 1, "out: its rows must be contiguous");
  TORCH_CHECK_VALUE(types.size() == 5 * data.size() && widths.size() == data.size(), "expected a type for each part");
  const int64_t K = out.size(0), stride = out.stride(0);
  std::vector<Blocks> parts;
  for (size_t i = 0; i < data.size(); ++i) parts.push_back(blocks_of(data[i], types.slice(5 * i, 5), K, widths[i]));
  const Dtype dtype = dtype_of(out.scalar_type());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, K / MIN_GROUP, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * MIN_GROUP, last = end * MIN_GROUP;
    char* part_out = to + first * stride * out.element_size();
    for (const Blocks& part : parts) {
      widen_blocks(part, dtype, first, last, part_out, stride);
      part_out += part.N * out.element_size();
    }
  });
}

at::Tensor block_columns(const at::Tensor& data, at::IntArrayRef type, int64_t K, int64_t N, const at::Tensor& chosen) {
  const Blocks weight = blocks_of(data, type, K, N);
  const at::Tensor columns = chosen.contiguous();
  const int64_t* numbers = columns.const_data_ptr<int64_t>();
  const int64_t count = columns.numel();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_INDEX(numbers[i] >= 0 && numbers[i] < N, "column ", numbers[i], ": expected 0 to ", N - 1);
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
  library.def("block_floats(Tensor[] data, int[] types, int[] widths, Tensor(a!) out) -> ()");
  library.impl("block_floats", c10::DispatchKey::CPU, teal::block_floats);
  library.def("block_columns(Tensor data, int[] type, int K, int N, Tensor chosen) -> Tensor");
  library.impl("block_columns", c10::DispatchKey::CPU, teal::block_columns);
}
