// Entries of x as whole numbers, for products with integers (blocks.cpp, integer_matmul.cpp).
#pragma once

#include <limits>

#include "blocks.h"

namespace teal {

constexpr float TINY = 1e-30f;  // groups with no larger entry count as zeros: what they are worth would be no fp32

// values [32] of a group as whole numbers, the largest of them MOST in size. Returns what 1 is worth. If an entry is
// not finite that is NaN, and all numbers are 0.
TEAL_INLINE float whole_numbers(const float* values, float MOST, Integers numbers[2]) {
  const Lanes parts[2] = {load(values), load(values + LANES)};
  const bool finite = total(parts[0] * 0.0f + parts[1] * 0.0f) == 0.0f;
  const Lanes most = larger(larger(parts[0], -parts[0]), larger(parts[1], -parts[1]));
  const float top = largest(most), units = finite && top > TINY ? MOST / top : 0.0f;
  for (int h = 0; h < 2; ++h) {
    const Lanes scaled = units > 0 ? parts[h] * units : Lanes{};
    numbers[h] = __builtin_convertvector(scaled + (scaled < 0.0f ? Lanes{} - 0.5f : Lanes{} + 0.5f), Integers);
  }
  return finite ? top / MOST : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace teal
