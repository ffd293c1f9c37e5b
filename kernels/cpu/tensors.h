// What ops know of torch's tensors, apart from the loops, which do not know torch.

#pragma once

#include <ATen/core/Tensor.h>

#include "floats.h"

namespace teal {

inline Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Dtype::FP32;
    case at::kBFloat16: return Dtype::BF16;
    case at::kHalf: return Dtype::FP16;
    default: TORCH_CHECK_VALUE(false, "dtype ", type, ": expected fp32, bf16 or fp16");
  }
}

}  // namespace teal
