// Products with blocks as one C function, so that a test can compile them for other processors than the one at hand.
#include "blocks.cpp"

extern "C" void product(const uint8_t* data, const int32_t* type, int64_t K, int64_t N, int32_t dtype, const float* x,
                        int64_t rows, float limit, float* y) {
  const teal::Blocks weight{data, K, N, type[0], type[1], type[2], type[3], type[4], 0};
  for (int64_t r = 0; r < rows; r += teal::GATHER_ROWS) {
    const int64_t count = std::min(rows - r, teal::GATHER_ROWS);
    const teal::Entries entries{x + r * K, K, count, limit, 0, K};
    teal::multiply_blocks(weight, static_cast<teal::Dtype>(dtype), entries, 0, N, y + r * N, N);
  }
}
