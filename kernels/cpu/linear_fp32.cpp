// The op of dot.cpp: y = x @ W^T in fp32, for a few rows of x and a weight [V, K] of any float dtype. Torch's own
// product rounds sums to the weight's dtype. output_head.py calls the op.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "matrix.h"
#include "tensors.h"

namespace teal {
namespace {

constexpr int64_t GRAIN = 256;  // outputs of a task, at least

at::Tensor linear_fp32(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t rows = x.size(0), V = weight.size(0), K = weight.size(1);
  TORCH_CHECK_VALUE(x.dim() == 2 && rows <= DOT_ROWS && x.size(1) == K,
                    "x and weight: expected few rows [n, K] and [V, K]");
  TORCH_CHECK_VALUE(weight.stride(1) == 1, "weight: its rows must be contiguous");
  const Dtype dtype = dtype_of(weight.scalar_type());
  at::Tensor wide = at::zeros({rows, padded(K)}, x.options().dtype(at::kFloat));
  wide.narrow(1, 0, K).copy_(x);
  at::Tensor y = at::empty({rows, V}, x.options().dtype(at::kFloat));
  Matrix matrix{};
  matrix.values = weight.const_data_ptr();
  matrix.K = K;
  matrix.N = V;
  matrix.stride = weight.stride(0);
  matrix.storage = Storage::OUTPUT_MAJOR;
  const float* from = wide.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, V, GRAIN, [&](int64_t begin, int64_t end) {
    dot(from, rows, matrix, dtype, begin, end, to + begin, V);
  });
  return y;
}

}  // namespace
}  // namespace teal

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def("linear_fp32(Tensor x, Tensor weight) -> Tensor");
  library.impl("linear_fp32", c10::DispatchKey::CPU, teal::linear_fp32);
}
