// What ops know of torch's tensors, apart from the loops, which do not know torch.

#pragma once

#include <ATen/core/Tensor.h>

#include "blocks.h"

namespace teal {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::FP32;
    case at::kBFloat16: return Dtype::BF16;
    case at::kHalf: return Dtype::FP16;
    default: TORCH_CHECK_VALUE(false, "dtype ", type, ": expected fp32, bf16 or fp16");
  }
}

// A weight of block_linear.py: its bytes and the five numbers of its type.
inline Blocks blocks_of(const at::Tensor& data, at::IntArrayRef type, int64_t K, int64_t N) {
  TORCH_CHECK_VALUE(data.scalar_type() == at::kByte && data.is_contiguous(), "data: expected contiguous bytes");
  TORCH_CHECK_VALUE(type.size() == 5, "type: expected five numbers");
  Blocks w{data.const_data_ptr<uint8_t>(), K, N, 0, 0, 0, 0, 0, 0};
  int32_t* fields[] = {&w.bits, &w.offset, &w.group, &w.has_minima, &w.nested};
  for (size_t i = 0; i < 5; ++i) *fields[i] = static_cast<int32_t>(type[i]);
  return w;
}

}  // namespace teal
