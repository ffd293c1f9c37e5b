// Products with blocks, and their floats, as C functions: a test compiles them for other processors than this one.
#include "blocks.h"
#include "matrix.h"

static teal::Blocks weight_of(const uint8_t* data, const int32_t* type, int64_t K, int64_t N) {
  return {data, K, N, type[0], type[1], type[2], type[3], type[4], 0};
}

extern "C" void product(const uint8_t* data, const int32_t* type, int64_t K, int64_t N, int32_t dtype, const float* x,
                        int64_t rows, float limit, float* y) {
  const teal::Blocks weight = weight_of(data, type, K, N);
  for (int64_t r = 0; r < rows; r += teal::GATHER_ROWS) {
    const int64_t count = rows - r < teal::GATHER_ROWS ? rows - r : teal::GATHER_ROWS;
    const teal::Entries entries{x + r * K, K, count, limit, 0, K};
    teal::multiply_blocks(weight, static_cast<teal::Dtype>(dtype), entries, 0, N, y + r * N, N);
  }
}

extern "C" void floats(const uint8_t* data, const int32_t* type, int64_t K, int64_t N, int32_t dtype, void* out) {
  teal::widen_blocks(weight_of(data, type, K, N), static_cast<teal::Dtype>(dtype), 0, K, 0, N, out, N);
}
