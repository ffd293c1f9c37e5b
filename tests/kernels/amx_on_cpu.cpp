// amx.h's products with its registers emulated, as a C function: a test runs it on any processor.
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

static thread_local struct {
  uint8_t bytes[8][16][64];
  bool whole;
} tiles;

static void load_config(const void* config) {
  uint8_t shape[64];
  std::memcpy(shape, config, sizeof(shape));
  tiles.whole = shape[0] == 1;  // the palette
  for (int t = 0; t < 8; ++t) tiles.whole = tiles.whole && shape[16 + 2 * t] == 64 && shape[48 + t] == 16;
}

static void load_tile(int t, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(tiles.bytes[t][row], static_cast<const uint8_t*>(from) + row * stride, tiles.whole ? 64 : 0);
}

static void store_tile(int t, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles.bytes[t][row], 64);
}

static float widened(const uint8_t* bf16) {
  float value;
  const uint32_t word = (bf16[0] | bf16[1] << 8) << 16;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// c [16][16] += a [16][16 pairs] times b [16 pairs][16], pair by pair.
static void multiply_tile(int c, int a, int b) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 16; ++column) {
      float sum;
      std::memcpy(&sum, tiles.bytes[c][row] + 4 * column, sizeof(sum));
      for (int k = 0; k < 32; ++k)
        sum += widened(tiles.bytes[a][row] + 2 * k) * widened(tiles.bytes[b][k / 2] + 4 * column + 2 * (k % 2));
      std::memcpy(tiles.bytes[c][row] + 4 * column, &sum, sizeof(sum));
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define __AMX_BF16__ 1
#define _tile_loadconfig load_config
#define _tile_release() (tiles.whole = false)
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_dpbf16ps multiply_tile
#include "amx.h"

// y [rows][64] += x [rows, K] times a panel [K / 2][64][2], channels of which are met at a time.
extern "C" void multiply(const void* x, int64_t rows, int64_t K, const void* panel, int64_t channels, float* y) {
  using teal::BFloat16;
  using Rows = teal::TileRows<64>;
  const Rows all(static_cast<const BFloat16*>(x), rows, K);
  std::vector<float> sums(all.padded() * 64);
  std::memcpy(sums.data(), y, rows * 64 * sizeof(float));
  const Rows::Scope scope;
  for (int64_t k = 0; k < K; k += channels) {
    const auto* const own = static_cast<const BFloat16*>(panel) + k * 64;
    all.multiply(k, own, (K - k < channels ? K - k : channels) / 2, sums.data());
  }
  std::memcpy(y, sums.data(), rows * 64 * sizeof(float));
}
