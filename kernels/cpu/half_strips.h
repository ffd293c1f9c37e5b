// What products of many rows with weights in blocks share: they sum half a strip's columns at a time, rows by sixes.
#pragma once

#include <algorithm>

#include "blocks.h"
#include "floats.h"

namespace teal {

constexpr int64_t HALF_STRIP = STRIP / 2;
constexpr int VECTORS = HALF_STRIP / LANES;
constexpr int ROWS = 6;  // their sums take 24 registers of 32

// The first columns, width at most, of sums [rows][64] into rows of y.
template <typename T>
void store_half(const float* sums, int64_t rows, int64_t width, T* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r, sums += HALF_STRIP, y += y_stride) {
    T row[HALF_STRIP];
    for (int v = 0; v < VECTORS; ++v) store(row + v * LANES, load(sums + v * LANES));
    std::copy_n(row, std::min(HALF_STRIP, width), y);
  }
}

}  // namespace teal
