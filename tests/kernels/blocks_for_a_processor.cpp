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

#if defined(TEAL_EMULATED)
// The same for an emulator: one call, read from stdin, whose result goes to stdout. No rows of x ask for the floats.
#include <cstdio>
#include <cstdlib>
#include <vector>

struct Call {
  int64_t K, N, rows, bytes;
  int32_t type[5], dtype;
  float limit;
  int32_t unused;
};

template <typename T>
static std::vector<T> read(int64_t count) {
  std::vector<T> found(count);
  if (std::fread(found.data(), sizeof(T), count, stdin) != static_cast<size_t>(count)) std::abort();
  return found;
}

int main() {
  const Call c = read<Call>(1)[0];
  const std::vector<uint8_t> data = read<uint8_t>(c.bytes);
  const std::vector<float> x = read<float>(c.rows * c.K);
  std::vector<float> found(c.rows ? c.rows * c.N : c.K * c.N);
  int64_t size = found.size() * sizeof(float);
  if (c.rows) {
    product(data.data(), c.type, c.K, c.N, c.dtype, x.data(), c.rows, c.limit, found.data());
  } else {
    floats(data.data(), c.type, c.K, c.N, c.dtype, found.data());
    size = c.dtype ? size / 2 : size;
  }
  return std::fwrite(found.data(), 1, size, stdout) != static_cast<size_t>(size);
}
#endif
