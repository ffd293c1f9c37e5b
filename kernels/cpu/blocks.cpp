// Products with integers as a GGUF file has them.
//
// Four kept channels at a time are interleaved: a lane then holds a column's four weights. One instruction multiplies
// them with four entries of x. For that an entry becomes a whole number of two bytes, relative to the largest of its
// group of channels. It errs by 1.5e-5 of that at most, less than bf16 and fp16 have rounded off. For fp32 three bytes
// err by 6e-8. Each byte takes a turn; what a channel's bits cost to unpack is shared by all turns and rows. One byte
// alone would save no time: 512 x 512 took 4.1 us of a Zen 5 core either way.
//
// Sums of a group are whole numbers, exact in any order. Its scales and minima come after.

#include "blocks.h"

#include <algorithm>
#include <cmath>

#include "avx2.h"
#include "matrix.h"
#include "octets.h"
#include "whole_numbers.h"

namespace teal {
namespace {

constexpr int VECTORS = STRIP / LANES;
constexpr int64_t CHANNELS = 512;  // listed at once: the list lies on the stack
constexpr int64_t WIDTH = 1024;    // most columns summed at once for one row, and a quarter of it for more: L1
constexpr int64_t PAIR = 2;        // quads of channels in flight at once: saves half of the traffic of sums
// Rows fetched ahead of those in use. With 8, 16 and 32 the projections of a 135M model in 4 bits took two Zen 5 cores
// 2.5, 2.2 and 2.4 ms. At 50% they took 2.0, 1.75 and 1.9.
constexpr int64_t AHEAD = 16;

// A group's kept channels, in quads. The last one repeats its last channel, with entries of 0.
template <int ROWS, int DIGITS>
struct Group {
  int64_t channel;               // the group's first
  int32_t* quads;                // [count][4] channels
  int64_t count;
  float unit[ROWS], sum[ROWS];   // what 1 is worth; of all entries
  int32_t digit_sums[ROWS][DIGITS];
  int32_t entries[ROWS][DIGITS][MIN_GROUP / 4];  // four bytes each
};

// Those of some neighbouring groups that have any.
template <int ROWS, int DIGITS>
struct Groups {
  Group<ROWS, DIGITS> groups[CHANNELS / 16];
  int32_t channels[CHANNELS + LANES];
  int64_t count = 0, quads = 0;
};

// values [32], zeros at the end, as whole numbers of DIGITS bytes, each from -128 to 127.
template <int ROWS, int DIGITS>
void split(const float* values, int64_t r, Group<ROWS, DIGITS>& group) {
  Integers numbers[2];
  group.unit[r] = whole_numbers(values, 127.0f * (1 << 8 * (DIGITS - 1)), numbers);
  std::fill(group.digit_sums[r], group.digit_sums[r] + DIGITS, 0);
  for (int h = 0; h < 2; ++h)
    for (int t = 0; t < DIGITS; ++t) {
      const Integers digit = numbers[h] << 24 >> 24;
      const Bytes bytes = __builtin_convertvector(digit, Bytes);
      std::memcpy(group.entries[r][t] + h * LANES / 4, &bytes, sizeof(bytes));
      group.digit_sums[r][t] += total(digit);
      numbers[h] = (numbers[h] - digit) >> 8;
    }
  float sum = 0.0f;
  for (int t = DIGITS; t-- > 0;) sum = sum * 256.0f + static_cast<float>(group.digit_sums[r][t]);
  group.sum[r] = sum * group.unit[r];
}

// List what rows of x keep of a group's channels, if anything.
template <int ROWS, int DIGITS>
void append(const Entries& entries, int64_t channel, int64_t size, Groups<ROWS, DIGITS>& kept) {
  alignas(64) float values[ROWS][MIN_GROUP + LANES] = {};
  int32_t* channels = kept.channels + 4 * kept.quads;
  int64_t count = 0;
  if constexpr (ROWS == 1) {
    count = compact_row(entries.x + channel, size, static_cast<int32_t>(channel), entries.limit, channels, values[0]);
    std::fill(values[0] + count, values[0] + MIN_GROUP, 0.0f);
  } else {
    for (int64_t k = channel; k < channel + size; ++k) {
      bool any = false;
      for (int64_t r = 0; r < entries.rows; ++r) {
        const float value = entries.x[r * entries.stride + k];
        const bool keep = !(std::fabs(value) < entries.limit);  // NaN stays
        values[r][count] = keep ? value : 0.0f;
        any |= keep;
      }
      channels[count] = static_cast<int32_t>(k);
      count += any;
    }
    for (int64_t r = 0; r < ROWS; ++r) values[r][count] = 0.0f;
  }
  if (count == 0) return;
  Group<ROWS, DIGITS>& group = kept.groups[kept.count++];
  group.channel = channel;
  group.quads = channels;
  group.count = (count + 3) / 4;
  std::fill(channels + count, channels + 4 * group.count, channels[count - 1]);
  for (int r = 0; r < ROWS; ++r) split(values[r], r, group);
  kept.quads += group.count;
}

// A quad's bytes of a strip, interleaved.
template <int BITS>
TEAL_INLINE void quad_octets(const Blocks& w, const int32_t* channels, int64_t strip, Octets out[VECTORS]) {
  const int64_t stride = w.row_bytes();
  if constexpr (BITS == 4) {  // two of them in a byte
    Octets rows[4], both[4];
    for (int k = 0; k < 4; ++k) rows[k] = load_bytes<Octets>(w.values + channels[k] * stride + strip * 64);
    interleave(rows, both);
    for (int v = 0; v < 4; ++v) {
      out[v] = both[v] & 15;
      out[4 + v] = both[v] >> 4;
    }
  } else {
    Octets rows[2][4];
    for (int k = 0; k < 4; ++k) {
      Octets halves[2];
      strip_octets<BITS>(w.values + channels[k] * stride, w.columns(), strip, halves);
      rows[0][k] = halves[0];
      rows[1][k] = halves[1];
    }
    interleave(rows[0], out);
    interleave(rows[1], out + 4);
  }
}

template <int BITS>
TEAL_INLINE void prefetch(const Blocks& w, int32_t channel, int64_t strip) {
  const uint8_t* row = w.values + channel * w.row_bytes();
  __builtin_prefetch(row + strip * (BITS == 8 ? STRIP : STRIP / 2));
  if (BITS == 8) __builtin_prefetch(row + strip * STRIP + STRIP / 2);
  if (BITS == 5 || BITS == 6) __builtin_prefetch(row + w.columns() / 2 + strip * 16 * (BITS - 4));
}

// A strip's scales and minima, which are needed after all of a group's channels.
TEAL_INLINE void prefetch_scales(const Blocks& w, const Scales& s, int64_t channel, int64_t column) {
  const int64_t bytes = w.nested ? 1 : sizeof(Half);
  const char* scales = s.scales + (channel / w.group * w.columns() + column) * bytes;
  const char* minima = s.minima + (channel / MIN_GROUP * w.columns() + column) * bytes;
  for (int64_t i = 0; i < STRIP * bytes; i += 64) {
    __builtin_prefetch(scales + i);
    if (w.has_minima) __builtin_prefetch(minima + i);
  }
}

// found[strip][row][digit][vector] += products with QUADS of a group's quads from quad on. Rows of last are the end.
template <int BITS, int ROWS, int DIGITS, int QUADS>
void add_quads(const Blocks& w, const Group<ROWS, DIGITS>& group, int64_t quad, const int32_t* last, int64_t begin,
               int64_t end, Integers (*found)[ROWS][DIGITS][VECTORS]) {
  const int32_t* channels = group.quads + 4 * quad;
  const int32_t* ahead = std::min(channels + AHEAD, last - 4 * QUADS);
  for (int64_t strip = begin; strip < end; ++strip, ++found) {
    for (int i = 0; i < 4 * QUADS; ++i) prefetch<BITS>(w, ahead[i], strip);
#if defined(TEAL_AVX2)
    int32_t x[ROWS][DIGITS][QUADS];
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < DIGITS; ++t) std::copy_n(group.entries[r][t] + quad, QUADS, x[r][t]);
    add_strip_256<BITS, ROWS, DIGITS, QUADS>(w, channels, strip, x, *found);
#else
    Octets octets[QUADS][VECTORS];
    for (int q = 0; q < QUADS; ++q) quad_octets<BITS>(w, channels + 4 * q, strip, octets[q]);
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < DIGITS; ++t)
        for (int v = 0; v < VECTORS; ++v) {
          Integers sum = (*found)[r][t][v];
          for (int q = 0; q < QUADS; ++q) sum = add_products(sum, octets[q][v], group.entries[r][t][quad + q]);
          (*found)[r][t][v] = sum;
        }
#endif
  }
}

// sums += a strip's whole numbers of a group, times scales, and minima.
template <int ROWS, int DIGITS, bool NESTED, bool MINIMA>
void add_scaled(Blocks w, const Scales s, const Group<ROWS, DIGITS>& group, int64_t column,
                const Integers (*found)[DIGITS][VECTORS], float* sums) {
  w.nested = NESTED;  // a local copy of what the loop below does not change: no store of it can
  w.has_minima = MINIMA;
  const int64_t channel = group.channel;
#if defined(TEAL_AVX2)
  add_scaled_256<ROWS, DIGITS, MINIMA>(w, s, channel, group.unit, group.sum, column, found, sums, WIDTH);
#else
  Lanes units[ROWS], entries[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    units[r] = Lanes{} + group.unit[r];
    entries[r] = Lanes{} + group.sum[r];
  }
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t n = column + v * LANES;
    const Lanes scale = scale_of(w, s, channel, n);
    const Lanes minimum = MINIMA ? minimum_of(w, s, channel, n) : Lanes{};
    for (int r = 0; r < ROWS; ++r) {
      Lanes total = __builtin_convertvector(found[r][DIGITS - 1][v], Lanes);
      for (int t = DIGITS - 1; t-- > 0;)
        total = add_product(__builtin_convertvector(found[r][t][v], Lanes), total, Lanes{} + 256.0f);
      float* to = sums + r * WIDTH + v * LANES;
      Lanes sum = add_product(load(to), total, scale * units[r]);
      if (MINIMA) sum = add_product(sum, minimum, entries[r]);
      store(to, sum);
    }
  }
#endif
}

template <int ROWS, int DIGITS>
void add_scaled(const Blocks& w, const Scales& s, const Group<ROWS, DIGITS>& group, int64_t column,
                const Integers (*found)[DIGITS][VECTORS], float* sums) {
  if (w.nested)
    w.has_minima ? add_scaled<ROWS, DIGITS, true, true>(w, s, group, column, found, sums)
                 : add_scaled<ROWS, DIGITS, true, false>(w, s, group, column, found, sums);
  else
    w.has_minima ? add_scaled<ROWS, DIGITS, false, true>(w, s, group, column, found, sums)
                 : add_scaled<ROWS, DIGITS, false, false>(w, s, group, column, found, sums);
}

// sums [ROWS][WIDTH] of strips begin to end.
template <int BITS, int ROWS, int DIGITS>
void sum_strips(const Blocks& w, const Entries& entries, int64_t begin, int64_t end, float* sums) {
  constexpr int64_t STRIPS = WIDTH / STRIP / ROWS;
  const Scales scales(w);
  Integers found[STRIPS][ROWS][DIGITS][VECTORS];
  for (int64_t first = entries.first; first < entries.last; first += CHANNELS) {
    Groups<ROWS, DIGITS> kept;
    for (int64_t k = first; k < std::min(entries.last, first + CHANNELS); k += w.group)
      append(entries, k, w.group, kept);
    const int32_t* last = kept.channels + 4 * kept.quads;
    for (int64_t g = 0; g < kept.count; ++g) {
      const Group<ROWS, DIGITS>& group = kept.groups[g];
      for (int64_t i = 0; i < end - begin; ++i) {
        prefetch_scales(w, scales, group.channel, (begin + i) * STRIP);
        for (int r = 0; r < ROWS; ++r)
          for (int t = 0; t < DIGITS; ++t)
            std::fill_n(found[i][r][t], VECTORS, Integers{} - w.offset * group.digit_sums[r][t]);
      }
      int64_t quad = 0;
      for (; quad + PAIR <= group.count; quad += PAIR)
        add_quads<BITS, ROWS, DIGITS, PAIR>(w, group, quad, last, begin, end, found);
      if (quad < group.count) add_quads<BITS, ROWS, DIGITS, 1>(w, group, quad, last, begin, end, found);
      for (int64_t i = 0; i < end - begin; ++i)
        add_scaled(w, scales, group, (begin + i) * STRIP, found[i], sums + i * STRIP);
    }
  }
}

template <int BITS, int ROWS>
void by_digits(const Blocks& w, Dtype dtype, const Entries& entries, int64_t begin, int64_t end, float* sums) {
  if (dtype == Dtype::FP32) return sum_strips<BITS, ROWS, 3>(w, entries, begin, end, sums);
  sum_strips<BITS, ROWS, 2>(w, entries, begin, end, sums);
}

}  // namespace

void multiply_blocks(const Blocks& weight, Dtype dtype, const Entries& entries, int64_t begin, int64_t end, float* y,
                     int64_t y_stride) {
  alignas(64) float sums[GATHER_ROWS * WIDTH];
  const int64_t strips = WIDTH / STRIP / (entries.rows == 1 ? 1 : GATHER_ROWS);
  while (begin < end) {
    const int64_t strip = begin / STRIP, to = std::min(end, (strip + strips) * STRIP);
    const int64_t last = (to + STRIP - 1) / STRIP;
    for (int64_t r = 0; r < entries.rows; ++r) std::fill_n(sums + r * WIDTH, strips * STRIP, 0.0f);
    by_bits(weight, [&](auto bits) {
      if (entries.rows == 1) return by_digits<bits.value, 1>(weight, dtype, entries, strip, last, sums);
      by_digits<bits.value, GATHER_ROWS>(weight, dtype, entries, strip, last, sums);
    });
    const float* from = sums + begin - strip * STRIP;
    for (int64_t r = 0; r < entries.rows; ++r) std::copy_n(from + r * WIDTH, to - begin, y + r * y_stride);
    y += to - begin;
    begin = to;
  }
}

}  // namespace teal
