// Weights of 8 and 4 bits (packing.py) to floats on a CPU, in one pass over memory. Products with many rows of x take
// such a dense weight. quantized_matmul.py describes the op.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

namespace {

constexpr int INPUT_GROUP_COLUMNS = 32;  // packed together where groups lie along the input
constexpr int64_t ROWS_AT_ONCE = 8;          // of a task, at least

// The integers of COLUMNS columns from values on, as floats.
template <int BITS, int COLUMNS, typename Value>
void integers(const Value* values, float* out) {
  if constexpr (BITS == 8) {
    for (int n = 0; n < COLUMNS; ++n) out[n] = values[n];
  } else {
    for (int j = 0; j < 8; ++j)
      for (int w = 0; w < COLUMNS / 8; ++w) out[j * COLUMNS / 8 + w] = values[w] >> (4 * j) & 15;
  }
}

template <typename T, int BITS, int COLUMNS, bool BY_INPUT>
void run(const at::Tensor& values, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
         at::ArrayRef<int32_t> refined, at::Tensor& out) {
  using Value = std::conditional_t<BITS == 8, int8_t, int32_t>;
  constexpr int64_t VALUES = BITS == 8 ? COLUMNS : COLUMNS / 8;
  const int64_t K = out.size(0), N = out.size(1), value_stride = values.stride(0), scale_stride = scales.stride(0);
  const int64_t channels = BY_INPUT ? K / scales.size(0) : 1;
  const Value* value_data = values.const_data_ptr<Value>();
  const T* scale_data = scales.const_data_ptr<T>();
  const uint8_t* zero_data = zeros ? zeros->const_data_ptr<uint8_t>() : nullptr;
  T* out_data = out.mutable_data_ptr<T>();
  // Group g of a row of values, as floats.
  const auto group_floats = [&](int64_t row, int64_t g, float* found) {
    const T* scale = scale_data + row / channels * scale_stride;
    const uint8_t* zero = zero_data + row / channels * scale_stride;
    integers<BITS, COLUMNS>(value_data + row * value_stride + g * VALUES, found);
    for (int n = 0; n < COLUMNS; ++n) {
      const int64_t at = BY_INPUT ? g * COLUMNS + n : g;
      const float offset = BITS == 4 ? zero[at] : 0;
      found[n] = (found[n] - offset) * static_cast<float>(scale[at]);
    }
  };
  at::parallel_for(0, K, ROWS_AT_ONCE, [&](int64_t first, int64_t last) {
    auto second = std::lower_bound(refined.begin(), refined.end(), first);  // the next refined channel
    for (int64_t k = first; k < last; ++k) {
      const bool has_second = second != refined.end() && *second == k;
      for (int64_t g = 0; g < N / COLUMNS; ++g) {
        float found[COLUMNS], rest[COLUMNS];
        group_floats(k, g, found);
        if (has_second) {
          group_floats(K + (second - refined.begin()), g, rest);
          for (int n = 0; n < COLUMNS; ++n) found[n] += rest[n];
        }
        T* y = out_data + k * N + g * COLUMNS;
        for (int n = 0; n < COLUMNS; ++n) y[n] = static_cast<T>(found[n]);
      }
      second += has_second;
    }
  });
}

template <typename T, int BITS>
void by_columns(const at::Tensor& values, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                at::ArrayRef<int32_t> refined, at::Tensor& out) {
  const int64_t N = out.size(1);
  if (scales.size(1) == N) return run<T, BITS, INPUT_GROUP_COLUMNS, true>(values, scales, zeros, refined, out);
  switch (N / scales.size(1)) {
    case 32: return run<T, BITS, 32, false>(values, scales, zeros, refined, out);
    case 64: return run<T, BITS, 64, false>(values, scales, zeros, refined, out);
    case 128: return run<T, BITS, 128, false>(values, scales, zeros, refined, out);
    default: TORCH_CHECK_VALUE(false, "scales: expected 32, 64 or 128 columns to a group");
  }
}

template <typename T>
void by_bits(const at::Tensor& values, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
             at::ArrayRef<int32_t> refined, at::Tensor& out) {
  if (zeros) return by_columns<T, 4>(values, scales, zeros, refined, out);
  by_columns<T, 8>(values, scales, zeros, refined, out);
}

void dequantize(const at::Tensor& values, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                const std::optional<at::Tensor>& refined, at::Tensor& out) {
  at::ArrayRef<int32_t> second;  // the channels that have a second row, after all others
  if (refined) {
    TORCH_CHECK_VALUE(refined->is_contiguous(), "refined: expected contiguous");
    second = {refined->const_data_ptr<int32_t>(), static_cast<size_t>(refined->numel())};
  }
  TORCH_CHECK_VALUE(values.stride(1) == 1 && scales.stride(1) == 1 && out.is_contiguous(), "rows must be contiguous");
  TORCH_CHECK_VALUE(!zeros || zeros->strides() == scales.strides(), "zeros and scales: expected one layout");
  const int64_t K = values.size(0) - static_cast<int64_t>(second.size()), N = values.size(1) * (zeros ? 8 : 1);
  TORCH_CHECK_VALUE(out.size(0) == K && out.size(1) == N, "out: expected the weight's shape");
  TORCH_CHECK_VALUE(out.scalar_type() == scales.scalar_type(), "out: expected the dtype of scales");
  switch (scales.scalar_type()) {
    case at::kFloat: return by_bits<float>(values, scales, zeros, second, out);
    case at::kBFloat16: return by_bits<at::BFloat16>(values, scales, zeros, second, out);
    case at::kHalf: return by_bits<at::Half>(values, scales, zeros, second, out);
    default: TORCH_CHECK_VALUE(false, "dtype ", scales.scalar_type(), ": expected fp32, bf16 or fp16");
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def("dequantize(Tensor values, Tensor scales, Tensor? zeros, Tensor? refined, Tensor(a!) out) -> ()");
  library.impl("dequantize", c10::DispatchKey::CPU, dequantize);
}
