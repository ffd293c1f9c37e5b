// Products of bf16 by the matrix registers of AMX (Intel's Xeons from Sapphire Rapids on), "tiles" of 16 rows of 64
// bytes. One instruction multiplies 16 rows by 16 columns, 32 channels of each:
//
//                              16 columns    16 columns     of a weight, two channels of a column beside each other
//                                  B0            B1         [16 pairs][16][2]
//      16 rows of x     A0         C0            C1         sums [16][16]
//      16 rows of x     A1         C2            C3
//
// A row's sums take their terms in the same order in any place, and rows of zeros fill up the last 16.
#pragma once

#include <algorithm>
#include <vector>

#include "floats.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TEAL_AMX
#endif

#if defined(TEAL_AMX)
namespace teal {

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_PAIRS = 16;    // of channels
constexpr int64_t TILE_COLUMNS = 16;  // of sums

// Linux hands the registers out on request, to a process.
inline bool amx_permitted() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl(2)
  static const bool permitted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return permitted;
}

// GCC 12's intrinsics do not say that they read memory: what they read must have been written before this.
inline void finish_writes(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// All registers are whole as long as this lives, in this thread.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14]{};
      uint16_t bytes_of_a_row[16]{};
      uint8_t rows[16]{};
    } shape;
    static_assert(sizeof(shape) == 64);
    for (int tile = 0; tile < 8; ++tile) shape.bytes_of_a_row[tile] = 64, shape.rows[tile] = TILE_ROWS;
    finish_writes(&shape);
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// sums [16 or, TWO, 32][width] += rows of x times a panel [pairs][width][2], for 32 columns. Rows of x are stride
// entries apart, 16 from x0 on and 16 from x1 on.
template <bool TWO>
inline void multiply_tiles(const BFloat16* x0, const BFloat16* x1, int64_t stride, const BFloat16* panel, int64_t pairs,
                           int64_t width, float* sums) {
  const int64_t row_bytes = width * sizeof(float);  // of sums and, two bf16 a column, of the panel
  finish_writes(sums);
  float* const below = sums + TILE_ROWS * width;
  _tile_loadd(0, sums, row_bytes);
  _tile_loadd(1, sums + TILE_COLUMNS, row_bytes);
  if constexpr (TWO) {
    _tile_loadd(2, below, row_bytes);
    _tile_loadd(3, below + TILE_COLUMNS, row_bytes);
  }
  for (int64_t p = 0; p < pairs; p += TILE_PAIRS, panel += TILE_PAIRS * width * 2) {
    _tile_loadd(6, panel, row_bytes);
    _tile_loadd(7, panel + TILE_COLUMNS * 2, row_bytes);
    _tile_loadd(4, x0 + 2 * p, stride * sizeof(BFloat16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (TWO) {
      _tile_loadd(5, x1 + 2 * p, stride * sizeof(BFloat16));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + TILE_COLUMNS, row_bytes);
  if constexpr (TWO) {
    _tile_stored(2, below, row_bytes);
    _tile_stored(3, below + TILE_COLUMNS, row_bytes);
  }
}

// Rows of x, 16 at a time; the last ones are copied beside zeros. WIDTH columns, a multiple of 32, meet them at once.
template <int64_t WIDTH>
class TileRows {
 public:
  using Scope = Tiles;  // to be held by a thread that multiplies

  TileRows(const BFloat16* x, int64_t rows, int64_t stride)
      : x(x), stride(stride), whole(rows / TILE_ROWS), last(rows % TILE_ROWS ? TILE_ROWS * stride : 0) {
    std::copy_n(x + whole * TILE_ROWS * stride, rows % TILE_ROWS * stride, last.begin());
  }
  int64_t padded() const { return tiles() * TILE_ROWS; }

  // sums [padded()][WIDTH] += rows times a panel [pairs][WIDTH][2] of the channels from k on; pairs: a multiple of 16.
  void multiply(int64_t k, const BFloat16* panel, int64_t pairs, float* sums) const {
    for (int64_t column = 0; column < WIDTH; column += 2 * TILE_COLUMNS) {
      const BFloat16* columns = panel + 2 * column;
      for (int64_t tile = 0; tile < tiles(); tile += 2) {
        float* to = sums + tile * TILE_ROWS * WIDTH + column;
        if (tile + 1 < tiles())
          multiply_tiles<true>(rows_of(tile) + k, rows_of(tile + 1) + k, stride, columns, pairs, WIDTH, to);
        else
          multiply_tiles<false>(rows_of(tile) + k, nullptr, stride, columns, pairs, WIDTH, to);
      }
    }
  }

 private:
  int64_t tiles() const { return whole + !last.empty(); }
  const BFloat16* rows_of(int64_t tile) const { return tile < whole ? x + tile * TILE_ROWS * stride : last.data(); }

  const BFloat16* x;
  int64_t stride, whole;
  std::vector<BFloat16> last;
};

}  // namespace teal
#endif
