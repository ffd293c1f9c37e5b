// Memory that a step works in.
#pragma once

#include <cstdint>
#include <vector>

namespace teal {

struct Chunk {
  int64_t row, begin, end;  // positions
};

struct Best {
  float value;
  int64_t index;
};

// Kept for the next step. The team's holder has it. It grows before the first phase alone: there it
// may fail.
struct Workspace {
  std::vector<float> residual, input, y, activated, q, cos, sin, partials, kept_values, sums;
  std::vector<int32_t> kept_channels, finished;
  std::vector<Chunk> chunks;
  std::vector<Best> best;
};

template <typename T>
T* grown(std::vector<T>& memory, int64_t count) {
  if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  return memory.data();
}

}  // namespace teal
