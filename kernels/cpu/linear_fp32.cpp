// y = x @ W^T in fp32 on a CPU, for a few rows of x and a weight [V, K] of any float dtype. Torch's own product rounds
// sums to the weight's dtype. output_head.py calls the op.
//
// A sum is kept as LANES partial sums, each over every LANES-th channel. One thread adds them up at the end in a fixed
// order. A row of x then has the same bits alone and beside others, for any number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace {

constexpr int64_t LANES = 16;    // a register of AVX-512
constexpr int64_t MAX_ROWS = 8;
constexpr int64_t GRAIN = 256;   // outputs of a task, at least

using Lanes = float __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));

inline int64_t padded(int64_t K) { return (K + LANES - 1) / LANES * LANES; }

inline Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

inline Lanes load(const at::BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Lanes lanes;
  std::memcpy(&lanes, &words, sizeof(lanes));
  return lanes;
}

inline Lanes load(const at::Half* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words);
  const Words sign = (words & 0x8000) << 16, magnitude = (words & 0x7fff) << 13;
  Lanes lanes;
  std::memcpy(&lanes, &magnitude, sizeof(lanes));
  lanes *= 0x1p112f;  // the difference of the exponents' biases; subnormal numbers come out right, too
  Words bits;
  std::memcpy(&bits, &lanes, sizeof(bits));
  bits |= sign | (Words((words & 0x7c00) == 0x7c00) & 0x7f800000);  // infinity and NaN
  std::memcpy(&lanes, &bits, sizeof(lanes));
  return lanes;
}

inline float total(const Lanes& sums) {
  using Half = float __attribute__((vector_size(2 * LANES)));
  using Quarter = float __attribute__((vector_size(LANES)));
  Half halves[2];
  std::memcpy(halves, &sums, sizeof(halves));
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof(quarters));
  const Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// y[r][c] = dot(x[r], w[c]) for ROWS rows of x, each followed by zeros to whole vectors, and COLUMNS rows of the weight.
// So many sums at once hide the latency of an addition.
template <typename T, int ROWS, int COLUMNS>
void dot(const float* x, const T* w, int64_t stride, int64_t K, float* y, int64_t y_stride) {
  const int64_t whole = K / LANES * LANES, x_stride = padded(K);
  Lanes sums[ROWS][COLUMNS] = {};
  const auto add = [&](int64_t k, const T* weights, int64_t step) {
    Lanes weight[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) weight[c] = load(weights + c * step);
    for (int r = 0; r < ROWS; ++r) {
      const Lanes entries = load(x + r * x_stride + k);
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += entries * weight[c];
    }
  };
  for (int64_t k = 0; k < whole; k += LANES) add(k, w + k, stride);
  if (whole < K) {
    T last[COLUMNS * LANES] = {};
    for (int c = 0; c < COLUMNS; ++c) std::copy(w + c * stride + whole, w + c * stride + K, last + c * LANES);
    add(whole, last, LANES);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) y[r * y_stride + c] = total(sums[r][c]);
}

template <typename T, int ROWS, int COLUMNS>
void run(const float* x, const at::Tensor& weight, int64_t begin, int64_t end, float* y) {
  const int64_t V = weight.size(0), K = weight.size(1), stride = weight.stride(0);
  const T* w = weight.const_data_ptr<T>();
  int64_t v = begin;
  for (; v + COLUMNS <= end; v += COLUMNS) dot<T, ROWS, COLUMNS>(x, w + v * stride, stride, K, y + v, V);
  for (; v < end; ++v) dot<T, ROWS, 1>(x, w + v * stride, stride, K, y + v, V);
}

template <typename T>
void run_rows(const float* x, int64_t rows, const at::Tensor& weight, int64_t begin, int64_t end, float* y) {
  switch (rows) {
    case 1: return run<T, 1, 4>(x, weight, begin, end, y);
    case 2: return run<T, 2, 4>(x, weight, begin, end, y);
    case 3: return run<T, 3, 4>(x, weight, begin, end, y);
    case 4: return run<T, 4, 4>(x, weight, begin, end, y);
    case 5: return run<T, 5, 2>(x, weight, begin, end, y);
    case 6: return run<T, 6, 2>(x, weight, begin, end, y);
    case 7: return run<T, 7, 2>(x, weight, begin, end, y);
    default: return run<T, 8, 2>(x, weight, begin, end, y);
  }
}

at::Tensor linear_fp32(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t rows = x.size(0), V = weight.size(0);
  TORCH_CHECK_VALUE(x.dim() == 2 && rows <= MAX_ROWS && x.size(1) == weight.size(1),
                    "x and weight: expected few rows [n, K] and [V, K]");
  TORCH_CHECK_VALUE(weight.stride(1) == 1, "weight: its rows must be contiguous");
  at::Tensor wide = at::zeros({rows, padded(x.size(1))}, x.options().dtype(at::kFloat));
  wide.narrow(1, 0, x.size(1)).copy_(x);
  at::Tensor y = at::empty({rows, V}, x.options().dtype(at::kFloat));
  const float* from = wide.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, V, GRAIN, [&](int64_t begin, int64_t end) {
    switch (weight.scalar_type()) {
      case at::kFloat: return run_rows<float>(from, rows, weight, begin, end, to);
      case at::kBFloat16: return run_rows<at::BFloat16>(from, rows, weight, begin, end, to);
      case at::kHalf: return run_rows<at::Half>(from, rows, weight, begin, end, to);
      default: TORCH_CHECK_VALUE(false, "dtype ", weight.scalar_type(), ": expected fp32, bf16 or fp16");
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def("linear_fp32(Tensor x, Tensor weight) -> Tensor");
  library.impl("linear_fp32", c10::DispatchKey::CPU, linear_fp32);
}
