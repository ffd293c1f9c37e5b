// y = x @ W over kept entries of x only, on a CPU. W is input-channel-major [K, N], so a dropped entry of x
// skips one contiguous row. Compiled at first use by native.py; sparse_linear.py describes the op and checks
// its arguments.
//
// The kept channels of all rows of x are listed once. It is their union: a weight row is read once for up to MAX_ROWS
// rows of x. The second rows of refined channels (packing.py) follow, each with its channel's entries of x. Then threads
// take disjoint blocks of columns. Every column is summed in fp32 in channel order by one thread, so
// the bits do not depend on the number of threads. Weights of 8 and 4 bits (packing.py) become floats in registers. The
// scale of a group multiplies the entry of x that all its weights meet.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 512;  // most columns a task sums: its accumulators stay in L1
constexpr int64_t LINE = 32;    // column blocks are multiples of this: whole cache lines of 16-bit weights
constexpr int64_t UNROLL = 4;   // weight rows in flight at once: hides memory latency, saves accumulator traffic
constexpr int64_t MAX_ROWS = 4;

inline float widen(float value) { return value; }
inline float widen(at::BFloat16 value) { return static_cast<float>(value); }
// at::Half's own conversion may be one scalar instruction, which keeps the loop from being vectorized.
inline float widen(at::Half value) { return c10::detail::fp16_ieee_to_fp32_value(value.x); }

// sum + a b in one rounding where the processor can. Channels are added to a sum one by one, in their order. A row of x
// then has the same bits alone and beside other rows, whose channels add 0.
inline float add_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

// Where sums go: [row][columns from some column on], in fp32 or rounded once to a dtype of 16 bits.
struct Output {
  void* data;
  at::ScalarType dtype;
  int64_t stride;  // elements from one row to the next

  Output from(int64_t column) const {
    return {static_cast<char*>(data) + column * c10::elementSize(dtype), dtype, stride};
  }

  void store(int64_t row, const float* sums, int64_t width) const {
    switch (dtype) {
      case at::kFloat: return write<float>(row, sums, width);
      case at::kBFloat16: return write<at::BFloat16>(row, sums, width);
      default: return write<at::Half>(row, sums, width);
    }
  }

 private:
  template <typename T>
  void write(int64_t row, const float* sums, int64_t width) const {
    T* to = static_cast<T*>(data) + row * stride;
    for (int64_t n = 0; n < width; ++n) to[n] = static_cast<T>(sums[n]);
  }
};

struct Kept {
  std::vector<int32_t> channels;  // rows of the weight: a channel, or K + j, which refines channel refined[j]
  std::vector<float> values;      // [channel][columns], an entry for each row of x: 0 where it drops the channel
};

template <typename T>
Kept compact(const T* x, int64_t rows, int64_t columns, int64_t K, at::ArrayRef<int32_t> refined, float threshold) {
  Kept kept;
  const int64_t E = refined.size();
  kept.channels.resize(K + E + UNROLL);
  kept.values.resize((K + E + UNROLL) * columns);
  const float limit = static_cast<float>(static_cast<T>(threshold));
  int64_t count = 0;
  const auto append_if_kept = [&](int64_t weight_row, int64_t k) {
    bool any = false;
    for (int64_t b = 0; b < rows; ++b) {
      const float value = static_cast<float>(x[b * K + k]);
      const bool keep = !(std::fabs(value) < limit);  // NaN stays NaN
      kept.values[count * columns + b] = keep ? value : 0.0f;
      any |= keep;
    }
    kept.channels[count] = static_cast<int32_t>(weight_row);
    count += any;
  };
  for (int64_t k = 0; k < K; ++k) append_if_kept(k, k);
  for (int64_t j = 0; j < E; ++j) {
    TORCH_CHECK_VALUE(refined[j] >= 0 && refined[j] < K, "refined channel ", refined[j], ": expected 0 to ", K - 1);
    append_if_kept(K + j, refined[j]);
  }
  kept.channels.resize(count);
  return kept;
}

template <typename T, int ROWS>
void sum_columns(const Kept& kept, const T* weight, int64_t stride, int64_t width, const Output& y) {
  alignas(64) float sums[ROWS][BLOCK] = {};
  const int64_t count = kept.channels.size();
  const int32_t* channels = kept.channels.data();
  const float* values = kept.values.data();
  int64_t i = 0;
  for (; i + UNROLL <= count; i += UNROLL) {
    const T* w0 = weight + channels[i] * stride;
    const T* w1 = weight + channels[i + 1] * stride;
    const T* w2 = weight + channels[i + 2] * stride;
    const T* w3 = weight + channels[i + 3] * stride;
    // The next rows are at no fixed distance, so the hardware does not prefetch them. This took all projections of a
    // 135M model in bf16 at 50% from 9.8 to 6.8 ms, on 2 Xeon cores.
    const int32_t* ahead = channels + std::min(i + UNROLL, count - UNROLL);
    for (int64_t n = 0; n < width; n += 64 / sizeof(T))
      for (int64_t u = 0; u < UNROLL; ++u) __builtin_prefetch(weight + ahead[u] * stride + n);
    for (int64_t n = 0; n < width; ++n) {
      const float a = widen(w0[n]), b = widen(w1[n]);
      const float c = widen(w2[n]), d = widen(w3[n]);
      for (int r = 0; r < ROWS; ++r) {
        const float* v = values + i * ROWS + r;
        const float two = add_product(add_product(sums[r][n], v[0], a), v[ROWS], b);
        sums[r][n] = add_product(add_product(two, v[2 * ROWS], c), v[3 * ROWS], d);
      }
    }
  }
  for (; i < count; ++i) {
    const T* w = weight + channels[i] * stride;
    for (int r = 0; r < ROWS; ++r)
      for (int64_t n = 0; n < width; ++n) sums[r][n] = add_product(sums[r][n], values[i * ROWS + r], widen(w[n]));
  }
  for (int r = 0; r < ROWS; ++r) y.store(r, sums[r], width);
}

struct Quantized {
  const at::Tensor& values;
  const at::Tensor& scales;
  const uint8_t* zeros;  // of 4-bit weights
  bool by_input;         // groups along the input dimension
};

// As sum_columns, for the groups of GROUP columns from first_group on.
template <typename T, int ROWS, int BITS, int GROUP>
void sum_groups(const Kept& kept, const Quantized& weight, int64_t first_group, int64_t groups, int64_t rows,
                const Output& y) {
  constexpr int64_t WORDS = GROUP / 8;
  alignas(64) float sums[ROWS][BLOCK] = {};
  float offsets[ROWS][BLOCK / GROUP] = {};
  const int64_t count = kept.channels.size(), row_groups = weight.scales.size(1);
  const T* scales = weight.scales.const_data_ptr<T>();
  using Value = std::conditional_t<BITS == 8, int8_t, int32_t>;
  constexpr int64_t VALUES = BITS == 8 ? GROUP : WORDS;  // to a group
  const Value* values = weight.values.const_data_ptr<Value>();
  for (int64_t i = 0; i < count; i += UNROLL) {
    int64_t at[UNROLL];  // the first group of each channel; past the last channel it again, times 0
    for (int64_t u = 0; u < UNROLL; ++u)
      at[u] = kept.channels[std::min(i + u, count - 1)] * row_groups + first_group;
    for (int64_t u = 0; u < UNROLL; ++u) {
      const int64_t ahead = kept.channels[std::min(i + UNROLL + u, count - 1)] * row_groups + first_group;
      for (int64_t n = 0; n < groups * VALUES; n += 64 / sizeof(Value)) __builtin_prefetch(values + ahead * VALUES + n);
    }
    for (int64_t g = 0; g < groups; ++g) {
      float a[ROWS][UNROLL];
      for (int r = 0; r < ROWS; ++r)
        for (int64_t u = 0; u < UNROLL; ++u)
          a[r][u] = i + u < count ? kept.values[(i + u) * ROWS + r] * widen(scales[at[u] + g]) : 0.0f;
      const Value* q[UNROLL];
      for (int64_t u = 0; u < UNROLL; ++u) q[u] = values + (at[u] + g) * VALUES;
      float* out = sums[0] + g * GROUP;
      const auto add = [&](int64_t n, float w0, float w1, float w2, float w3) {
        for (int r = 0; r < ROWS; ++r) {
          const float two = add_product(add_product(out[r * BLOCK + n], a[r][0], w0), a[r][1], w1);
          out[r * BLOCK + n] = add_product(add_product(two, a[r][2], w2), a[r][3], w3);
        }
      };
      if constexpr (BITS == 8) {
        for (int64_t n = 0; n < GROUP; ++n) add(n, q[0][n], q[1][n], q[2][n], q[3][n]);
      } else {
        for (int r = 0; r < ROWS; ++r)
          for (int64_t u = 0; u < UNROLL; ++u) offsets[r][g] = add_product(offsets[r][g], a[r][u], weight.zeros[at[u] + g]);
        for (int j = 0; j < 8; ++j)
          for (int64_t w = 0; w < WORDS; ++w)
            add(j * WORDS + w, q[0][w] >> (4 * j) & 15, q[1][w] >> (4 * j) & 15, q[2][w] >> (4 * j) & 15,
                q[3][w] >> (4 * j) & 15);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < groups * GROUP; ++n) sums[r][n] -= offsets[r][n / GROUP];
    y.store(r, sums[r], groups * GROUP);
  }
}

// As sum_columns, for weights with groups along the input dimension (packing.py). Within a group of channels the
// integers are summed as they are, those of 4 bits in the order of words and nibbles. Scales and zero points come after.
template <typename T, int ROWS, int BITS>
void sum_input_groups(const Kept& kept, const Quantized& weight, int64_t begin, int64_t width, int64_t rows,
                      const Output& y) {
  constexpr int64_t GROUP = 32, WORDS = GROUP / 8;  // columns packed together
  alignas(64) float sums[ROWS][BLOCK] = {};
  const int64_t N = weight.scales.size(1), channels = weight.values.size(0) / weight.scales.size(0);
  using Value = std::conditional_t<BITS == 8, int8_t, int32_t>;
  const int64_t count = kept.channels.size(), row_words = weight.values.size(1), words = width * row_words / N;
  const Value* values = weight.values.const_data_ptr<Value>() + begin * row_words / N;
  for (int64_t i = 0; i < count;) {
    const int64_t group = kept.channels[i] / channels;
    const int64_t end = std::lower_bound(kept.channels.begin() + i, kept.channels.end(), (group + 1) * channels) -
                        kept.channels.begin();
    alignas(64) float part[ROWS][BLOCK] = {};
    float entries[ROWS] = {};
    for (; i < end; i += UNROLL) {
      const Value* q[UNROLL];  // past the group's last channel it again, times 0
      float a[ROWS][UNROLL];
      for (int64_t u = 0; u < UNROLL; ++u) {
        q[u] = values + kept.channels[std::min(i + u, end - 1)] * row_words;
        for (int r = 0; r < ROWS; ++r) {
          a[r][u] = i + u < end ? kept.values[(i + u) * ROWS + r] : 0.0f;
          entries[r] += a[r][u];
        }
        const Value* ahead = values + kept.channels[std::min(i + UNROLL + u, count - 1)] * row_words;
        for (int64_t w = 0; w < words; w += 64 / sizeof(Value)) __builtin_prefetch(ahead + w);
      }
      const auto add = [&](int64_t n, float w0, float w1, float w2, float w3) {
        for (int r = 0; r < ROWS; ++r) {
          const float two = add_product(add_product(part[r][n], a[r][0], w0), a[r][1], w1);
          part[r][n] = add_product(add_product(two, a[r][2], w2), a[r][3], w3);
        }
      };
      if constexpr (BITS == 8) {
        for (int64_t n = 0; n < width; ++n) add(n, q[0][n], q[1][n], q[2][n], q[3][n]);
      } else {
        for (int j = 0; j < 8; ++j)
          for (int64_t w = 0; w < words; ++w)
            add(j * words + w, q[0][w] >> (4 * j) & 15, q[1][w] >> (4 * j) & 15, q[2][w] >> (4 * j) & 15,
                q[3][w] >> (4 * j) & 15);
      }
    }
    i = end;
    const T* scales = weight.scales.const_data_ptr<T>() + group * N + begin;
    for (int r = 0; r < ROWS; ++r)
      for (int64_t n = 0; n < width; ++n) {
        float integers;
        if constexpr (BITS == 8) {
          integers = part[r][n];
        } else {
          integers = part[r][n % GROUP / WORDS * words + n / GROUP * WORDS + n % WORDS];
          integers -= entries[r] * weight.zeros[group * N + begin + n];
        }
        sums[r][n] = add_product(sums[r][n], integers, widen(scales[n]));
      }
  }
  for (int64_t r = 0; r < rows; ++r) y.store(r, sums[r], width);
}

template <typename T, int BITS>
void sum_quantized(const Kept& kept, const Quantized& weight, int64_t begin, int64_t width, int64_t group, int64_t rows,
                   const Output& y) {
  if (weight.by_input) {
    if (rows == 1) return sum_input_groups<T, 1, BITS>(kept, weight, begin, width, rows, y);
    return sum_input_groups<T, MAX_ROWS, BITS>(kept, weight, begin, width, rows, y);
  }
  const auto of_group = [&]<int GROUP>() {
    if (rows == 1) return sum_groups<T, 1, BITS, GROUP>(kept, weight, begin / group, width / group, rows, y);
    return sum_groups<T, MAX_ROWS, BITS, GROUP>(kept, weight, begin / group, width / group, rows, y);
  };
  switch (group) {
    case 32: return of_group.template operator()<32>();
    case 64: return of_group.template operator()<64>();
    default: return of_group.template operator()<128>();
  }
}

template <typename T>
void run(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& thresholds, at::IntArrayRef segments,
         const std::optional<at::Tensor>& scales, const std::optional<at::Tensor>& zeros,
         const std::optional<at::Tensor>& refined, at::Tensor& y) {
  const int64_t rows = x.size(0), K = x.size(1), N = y.size(1), stride = weight.stride(0);
  const bool by_input = scales && scales->size(1) == N;
  const int64_t group = by_input ? LINE : scales ? N / scales->size(1) : 1;
  TORCH_CHECK_VALUE(!scales || group == 32 || group == 64 || group == 128, "groups: expected 32, 64 or 128 to one");
  const float* limits = thresholds.const_data_ptr<float>();
  const int64_t share = (N + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t unit = std::max(LINE, group);
  const int64_t block = std::clamp((share + unit - 1) / unit * unit, unit, BLOCK);
  at::ArrayRef<int32_t> second;  // the channels that have a second row
  if (refined) second = {refined->const_data_ptr<int32_t>(), static_cast<size_t>(refined->numel())};
  std::vector<Kept> kept;
  std::vector<std::pair<int64_t, int64_t>> tasks;  // (segment, first column)
  std::vector<int64_t> ends;
  int64_t column = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    const int64_t columns = scales && rows > 1 ? MAX_ROWS : rows;
    kept.push_back(compact<T>(x.const_data_ptr<T>(), rows, columns, K, second, limits[s]));
    for (int64_t begin = column; begin < column + segments[s]; begin += block) tasks.emplace_back(s, begin);
    column += segments[s];
    ends.push_back(column);
  }
  const Output out{y.mutable_data_ptr(), y.scalar_type(), N};
  at::parallel_for(0, tasks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const auto [s, begin] = tasks[t];
      const int64_t width = std::min(block, ends[s] - begin);
      if (scales) {
        const Quantized quantized{weight, *scales, zeros ? zeros->const_data_ptr<uint8_t>() : nullptr,
                                  by_input};
        const auto sum = zeros ? sum_quantized<T, 4> : sum_quantized<T, 8>;
        sum(kept[s], quantized, begin, width, group, rows, out.from(begin));
        continue;
      }
      const T* w = weight.const_data_ptr<T>() + begin;
      switch (rows) {
        case 1: sum_columns<T, 1>(kept[s], w, stride, width, out.from(begin)); break;
        case 2: sum_columns<T, 2>(kept[s], w, stride, width, out.from(begin)); break;
        case 3: sum_columns<T, 3>(kept[s], w, stride, width, out.from(begin)); break;
        default: sum_columns<T, 4>(kept[s], w, stride, width, out.from(begin));
      }
    }
  });
}

at::Tensor row_gather(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& thresholds,
                      at::IntArrayRef segments, const std::optional<at::Tensor>& scales,
                      const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& refined,
                      std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType dtype = out_dtype.value_or(x.scalar_type());
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == x.scalar_type(), "out_dtype ", dtype, ": expected fp32 or x's");
  TORCH_CHECK_VALUE(x.size(0) <= MAX_ROWS && x.is_contiguous(), "x: expected few, contiguous rows");
  TORCH_CHECK_VALUE(!scales || (weight.is_contiguous() && scales->is_contiguous() && (!zeros || zeros->is_contiguous())),
                    "a quantized weight must be contiguous");
  TORCH_CHECK_VALUE(!refined || (refined->is_contiguous() && weight.size(0) == x.size(1) + refined->numel()),
                    "refined: expected contiguous, with a row of the weight for each");
  const int64_t N = std::accumulate(segments.begin(), segments.end(), int64_t{0});
  at::Tensor y = at::empty({x.size(0), N}, x.options().dtype(dtype));
  switch (x.scalar_type()) {
    case at::kFloat: run<float>(x, weight, thresholds, segments, scales, zeros, refined, y); break;
    case at::kBFloat16: run<at::BFloat16>(x, weight, thresholds, segments, scales, zeros, refined, y); break;
    case at::kHalf: run<at::Half>(x, weight, thresholds, segments, scales, zeros, refined, y); break;
    default: TORCH_CHECK_VALUE(false, "dtype ", x.scalar_type(), ": expected fp32, bf16 or fp16");
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(teal_cpu, library) {
  library.def(
      "row_gather(Tensor x, Tensor weight, Tensor thresholds, int[] segments, Tensor? scales, Tensor? zeros, "
      "Tensor? refined=None, ScalarType? out_dtype=None) -> Tensor");
  library.impl("row_gather", c10::DispatchKey::CPU, row_gather);
}
