// A decode step of a few rows: embedding, blocks, head and argmax as phases of one job (team.h).
//
//     between phases, by one thread                       a phase's tasks, by all
//     residual += end(down); norm; list kept channels     q,k,v       blocks of columns
//     norms of heads, rotation, into the cache            attention   row x key head x chunk of positions
//     combine chunks; list                                o           blocks of columns
//     residual += end(o); norm; list                      gate,up     blocks of both, and activation(gate) * up
//     list                                                down        blocks of columns
//     after the last block: norm; list                    head        blocks of columns, and the argmax of each
//
// What families have beyond a plain model are fields of step.h's structs. Each has a value that changes nothing.
//
// Every sum belongs to one task and has a fixed order, whatever the number of threads and the rows beside it.

#include "step.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "activations.h"
#include "attention.h"
#include "product.h"
#include "team.h"
#include "workspace.h"

namespace teal {
namespace {

// Blocks of columns that a thread finds in a phase: with one alone a paused thread would hold up the other for long.
constexpr int64_t TASKS_PER_THREAD = 2, HEAD_TASKS_PER_THREAD = 8;

// NaN beats all else, as in torch's argmax.
bool beats(float value, float best) { return value > best || (value != value && best == best); }

class Step final : public Job {
 public:
  Step(const Model& model, const Call& call, Workspace& memory, int64_t threads);
  void task(int64_t index) override;
  int64_t next() override;

 private:
  enum class Phase { BEGIN, QKV, ATTENTION, O, GATE_UP, DOWN, HEAD };

  void find_angles();
  int64_t begin_block();
  int64_t begin_attention();
  int64_t begin_o();
  int64_t begin_gate_up();
  int64_t begin_head();
  void finish();

  int64_t begin_product(Phase phase, const Matrix& matrix, const float* x, int64_t columns);
  void finish_columns(int64_t begin, int64_t end);
  void embed(int64_t token, float* out) const;
  void attend_task(int64_t index);
  void argmax_task(int64_t index, int64_t begin, int64_t end);
  void cache_heads(int64_t row, const CacheLayout& cache);
  void norm_heads(float* y);
  void add_to_residual(const Norm& end);
  void norm_input(const Norm& norm);
  CacheLayout cache_layout() const {
    return {model_.dtype, model_.int8_cache != 0, model_.head_dim, call_.slot_stride};
  }

  const Model& model_;
  const Call& call_;
  Workspace& memory_;
  const int64_t threads_, rows_, q_size_, kv_size_;
  Phase phase_ = Phase::BEGIN;
  int64_t layer_ = 0;
  float *residual_, *input_, *activated_, *q_;
  int64_t y_stride_;
  Product product_;
  int64_t first_chunk_[STEP_ROWS + 1] = {};  // of a row's attention
};

Step::Step(const Model& model, const Call& call, Workspace& memory, int64_t threads)
    : model_(model),
      call_(call),
      memory_(memory),
      threads_(threads),
      rows_(call.rows),
      q_size_(model.heads * model.head_dim),
      kv_size_(model.kv_heads * model.head_dim),
      product_(model.dtype) {
  const int64_t widest = std::max({model.hidden, q_size_, model.intermediate});
  int64_t most_refined = model.head.E, partials = Product::partials_room(model.head);
  for (int64_t i = 0; i < model.layer_count; ++i) {
    const auto& layer = model.layers[i];
    for (const Matrix* m : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
      most_refined = std::max(most_refined, m->E);
      partials = std::max(partials, Product::partials_room(*m));
    }
  }
  residual_ = grown(memory.residual, rows_ * model.hidden);
  input_ = grown(memory.input, rows_ * padded(widest));
  activated_ = grown(memory.activated, rows_ * padded(model.intermediate));
  q_ = grown(memory.q, (rows_ * model.heads + 1) * padded(model.head_dim));  // and a key
  y_stride_ = padded(std::max({q_size_ + 2 * kv_size_, 2 * model.intermediate, model.hidden}));
  grown(memory.y, rows_ * y_stride_);
  const auto finished = threads * HEAD_TASKS_PER_THREAD + 1;
  product_.use_partials(grown(memory.sums, rows_ * partials), grown(memory.finished, finished));
  product_.use_lists(grown(memory.kept_channels, Product::LISTS * Kept::room(widest, most_refined)),
                     grown(memory.kept_values, Product::LISTS * Kept::room(widest, most_refined) * GATHER_ROWS),
                     Kept::room(widest, most_refined));
  int64_t chunks = 0;  // of a layer without a window
  for (int64_t r = 0; r < rows_ && call.hidden_in == nullptr; ++r) chunks += call.positions[r] / CHUNK + 1;
  memory.chunks.reserve(chunks);
  grown(memory.partials, chunks * model.heads * partial_size(model.head_dim));
  grown(memory.cos, model.rotation_count * rows_ * model.head_dim / 2);
  grown(memory.sin, model.rotation_count * rows_ * model.head_dim / 2);
  grown(memory.best, rows_ * (threads * HEAD_TASKS_PER_THREAD + 1));
}

int64_t Step::next() {
  switch (phase_) {
    case Phase::BEGIN:
      if (call_.hidden_in != nullptr) {
        std::copy(call_.hidden_in, call_.hidden_in + rows_ * model_.hidden, residual_);
        return begin_head();
      }
      for (int64_t r = 0; r < rows_; ++r) embed(call_.tokens[r], residual_ + r * model_.hidden);
      find_angles();
      return begin_block();
    case Phase::QKV: return begin_attention();
    case Phase::ATTENTION: return begin_o();
    case Phase::O: add_to_residual(model_.layers[layer_].attention_end); return begin_gate_up();
    case Phase::GATE_UP:
      return begin_product(Phase::DOWN, model_.layers[layer_].down, activated_, model_.hidden);
    case Phase::DOWN:
      add_to_residual(model_.layers[layer_].ffn_end);
      return ++layer_ < model_.layer_count ? begin_block() : begin_head();
    default: finish(); return 0;
  }
}

void Step::task(int64_t index) {
  if (phase_ == Phase::ATTENTION) return attend_task(index);
  const auto [begin, end] = product_.columns(index);
  const int64_t I = phase_ == Phase::GATE_UP ? model_.intermediate : 0;
  product_.multiply(index, begin, end);
  if (I) product_.multiply(index, I + begin, I + end);
  if (!product_.completes(index)) return;
  finish_columns(begin, end);
  if (phase_ == Phase::HEAD) return argmax_task(product_.block(index), begin, end);
  if (!I) return;
  finish_columns(I + begin, I + end);
  by_dtype(model_.dtype, [&](auto type) {
    for (int64_t r = 0; r < rows_; ++r) {
      const float* gate = product_.y(r) + begin;
      gated<decltype(type)>(model_.activation, gate, gate + I, end - begin, activated_ + r * padded(I) + begin);
    }
  });
}

// y of columns begin to end, rounded as a module's result; the head's may be capped instead.
void Step::finish_columns(int64_t begin, int64_t end) {
  product_.add_up(begin, end);
  if (phase_ == Phase::HEAD) {
    for (int64_t r = 0; r < rows_ && model_.logit_softcap; ++r)
      cap_softly(product_.y(r) + begin, end - begin, model_.logit_softcap);
    return;
  }
  by_dtype(model_.dtype, [&](auto type) {
    for (int64_t r = 0; r < rows_; ++r)
      round_and_add<decltype(type)>(product_.y(r) + begin, product_.bias(), begin, end - begin);
  });
}

void Step::embed(int64_t token, float* out) const {
  const Embedding& from = model_.embedding;
  const int64_t C = model_.hidden;
  by_dtype(model_.dtype, [&](auto type) {
    using T = decltype(type);
    if (from.blocks != nullptr) return widen_column(*from.blocks, token, out);
    const T* floats = static_cast<const T*>(from.values) + token * C;
    if (from.scales == nullptr) return widen_values(floats, model_.dtype, C, out);
    const int8_t* values = static_cast<const int8_t*>(from.values) + token * C;
    const T* scales = static_cast<const T*>(from.scales) + token * C / from.group;
    for (int64_t i = 0; i < C; ++i) out[i] = values[i] * widen(scales[i / from.group]);
  });
  for (int64_t i = 0; i < C; ++i) out[i] *= model_.embedding_scale;
}

int64_t Step::begin_product(Phase phase, const Matrix& matrix, const float* x, int64_t columns) {
  phase_ = phase;
  return product_.begin({&matrix, x, memory_.y.data(), y_stride_, columns}, rows_, threads_ * TASKS_PER_THREAD);
}

// A block

void Step::find_angles() {
  const int64_t half = model_.head_dim / 2;
  float *cos = memory_.cos.data(), *sin = memory_.sin.data();
  for (int64_t k = 0; k < model_.rotation_count; ++k) {
    const float *frequencies = model_.rotations + 2 * k * half, *factors = frequencies + half;
    for (int64_t r = 0; r < rows_; ++r, cos += half, sin += half)
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(call_.positions[r]) * frequencies[i];
        cos[i] = std::cos(angle) * factors[i];
        sin[i] = std::sin(angle) * factors[i];
      }
  }
}

void Step::norm_input(const Norm& norm) {
  const int64_t C = model_.hidden;
  by_dtype(model_.dtype, [&](auto type) {
    for (int64_t r = 0; r < rows_; ++r)
      normalize<decltype(type)>(residual_ + r * C, norm, C, model_.eps, input_ + r * padded(C));
  });
}

// residual += end(y).
void Step::add_to_residual(const Norm& end) {
  const int64_t C = model_.hidden;
  for (int64_t r = 0; r < rows_; ++r) {
    float* y = product_.y(r);
    if (end.weight != nullptr)
      by_dtype(model_.dtype, [&](auto type) { normalize<decltype(type)>(y, end, C, model_.eps, y); });
    for (int64_t n = 0; n < C; ++n) residual_[r * C + n] += y[n];
  }
}

int64_t Step::begin_block() {
  const Layer& layer = model_.layers[layer_];
  norm_input(layer.attention_norm);
  return begin_product(Phase::QKV, layer.qkv, input_, layer.qkv.N);
}

int64_t Step::begin_gate_up() {
  const Layer& layer = model_.layers[layer_];
  norm_input(layer.ffn_norm);
  return begin_product(Phase::GATE_UP, layer.gate_up, input_, model_.intermediate);
}

// Norms of a row's queries and keys, in place.
void Step::norm_heads(float* y) {
  const Layer& layer = model_.layers[layer_];
  const auto norm = [&](float* vector, const void* weight, int64_t size) {
    const int64_t width = model_.heads_normed_together ? size : model_.head_dim;
    by_dtype(model_.dtype, [&](auto type) {
      for (int64_t n = 0; n < size; n += width)
        rms_norm<decltype(type)>(vector + n, weight, width, model_.eps, vector + n);
    });
  };
  if (layer.q_norm != nullptr) norm(y, layer.q_norm, q_size_);
  if (layer.k_norm != nullptr) norm(y + q_size_, layer.k_norm, kv_size_);
}

// Norms and rotation of a row's heads; its keys and values go into the cache.
void Step::cache_heads(int64_t row, const CacheLayout& cache) {
  const int64_t D = model_.head_dim, H = model_.heads, KV = model_.kv_heads;
  float* y = product_.y(row);
  norm_heads(y);
  const int64_t angles = (model_.layers[layer_].rotation * rows_ + row) * D / 2;
  const float *cos = memory_.cos.data() + angles, *sin = memory_.sin.data() + angles;
  float* key = q_ + rows_ * H * padded(D);
  const int64_t at = layer_ * call_.layer_stride + row * call_.row_stride + call_.positions[row] * call_.slot_stride;
  by_dtype(model_.dtype, [&](auto type) {
    for (int64_t h = 0; h < H + KV; ++h) {
      float* out = h < H ? q_ + (row * H + h) * padded(D) : key;
      rotate<decltype(type)>(y + h * D, cos, sin, D, out);
      if (h >= H) write_slot(out, cache, call_.k + at + (h - H) * call_.head_stride);
    }
  });
  for (int64_t h = 0; h < KV; ++h)
    write_slot(y + q_size_ + kv_size_ + h * D, cache, call_.v + at + h * call_.head_stride);
}

int64_t Step::begin_attention() {
  phase_ = Phase::ATTENTION;
  const CacheLayout cache = cache_layout();
  const int64_t window = model_.layers[layer_].window;
  std::vector<Chunk>& chunks = memory_.chunks;
  chunks.clear();
  for (int64_t r = 0; r < rows_; ++r) {
    cache_heads(r, cache);
    const int64_t end = call_.positions[r] + 1;
    int64_t begin = window ? std::max<int64_t>(0, end - window) : 0;
    first_chunk_[r] = chunks.size();
    for (; begin < end; begin = (begin / CHUNK + 1) * CHUNK)
      chunks.push_back({r, begin, std::min(end, (begin / CHUNK + 1) * CHUNK)});
  }
  first_chunk_[rows_] = chunks.size();
  return first_chunk_[rows_] * model_.kv_heads;
}

void Step::attend_task(int64_t index) {
  const int64_t D = model_.head_dim, H = model_.heads, KV = model_.kv_heads, shared = H / KV;
  const Chunk& chunk = memory_.chunks[index / KV];
  const int64_t head = index % KV;
  const int64_t at = layer_ * call_.layer_stride + chunk.row * call_.row_stride + head * call_.head_stride;
  const float* q = q_ + (chunk.row * H + head * shared) * padded(D);
  float* partial = memory_.partials.data() + (index / KV * H + head * shared) * partial_size(D);
  const Scoring scoring{model_.attention_scale, model_.attention_softcap};
  attend(q, shared, call_.k + at, call_.v + at, cache_layout(), scoring, chunk.begin, chunk.end, partial);
}

int64_t Step::begin_o() {
  const int64_t D = model_.head_dim, H = model_.heads, size = partial_size(D);
  by_dtype(model_.dtype, [&](auto type) {
    for (int64_t r = 0; r < rows_; ++r) {
      float* out = input_ + r * padded(q_size_);
      const float* partial = memory_.partials.data() + first_chunk_[r] * H * size;
      for (int64_t h = 0; h < H; ++h)
        combine(partial + h * size, first_chunk_[r + 1] - first_chunk_[r], H * size, D, out + h * D);
      for (int64_t n = 0; n < q_size_; ++n) out[n] = rounded<decltype(type)>(out[n]);
      zero_tail(out, q_size_);
    }
  });
  return begin_product(Phase::O, model_.layers[layer_].o, input_, model_.hidden);
}

// The head

int64_t Step::begin_head() {
  if (call_.hidden_out != nullptr) std::copy(residual_, residual_ + rows_ * model_.hidden, call_.hidden_out);
  if (call_.logits == nullptr) return 0;
  norm_input(model_.norm);
  phase_ = Phase::HEAD;
  const Product::Work work{&model_.head, input_, call_.logits, model_.vocabulary, model_.vocabulary};
  return product_.begin(work, rows_, threads_ * HEAD_TASKS_PER_THREAD);
}

// The largest logit of a block, the first of equal ones; NaN is larger than all.
void Step::argmax_task(int64_t index, int64_t begin, int64_t end) {
  if (!call_.choose) return;
  for (int64_t r = 0; r < rows_; ++r) {
    const float* logits = call_.logits + r * model_.vocabulary;
    Best best{logits[begin], begin};
    for (int64_t n = begin + 1; n < end; ++n)
      if (beats(logits[n], best.value)) best = {logits[n], n};
    memory_.best[index * rows_ + r] = best;
  }
}

void Step::finish() {
  if (!call_.choose) return;
  for (int64_t r = 0; r < rows_; ++r) {
    Best best = memory_.best[r];
    for (int64_t i = 1; i < product_.blocks(); ++i)
      if (beats(memory_.best[i * rows_ + r].value, best.value)) best = memory_.best[i * rows_ + r];
    call_.tokens[r] = best.index;
    ++call_.positions[r];
  }
}

Outcome check(const Model& model, const Call& call) {
  if (call.hidden_in != nullptr) return Outcome::DONE;
  for (int64_t r = 0; r < call.rows; ++r) {
    if (call.tokens[r] < 0 || call.tokens[r] >= model.vocabulary) return Outcome::UNKNOWN_TOKEN;
    if (call.positions[r] < 0 || call.positions[r] >= call.slots) return Outcome::NO_SLOT;
  }
  return Outcome::DONE;
}

}  // namespace
}  // namespace teal

// A step on so many threads. Nothing is changed unless the outcome is DONE.
extern "C" int32_t teal_cpu_step(const teal::Model* model, const teal::Call* call, int64_t threads) {
  teal::Outcome outcome = teal::check(*model, *call);
  if (outcome == teal::Outcome::DONE) {
    teal::Team& team = teal::Team::instance();
    const auto held = team.hold();
    static teal::Workspace* memory = new teal::Workspace;
    try {
      teal::Step step(*model, *call, *memory, threads);
      team.run(step, threads);
    } catch (const std::bad_alloc&) {
      outcome = teal::Outcome::NO_MEMORY;
    }
  }
  return static_cast<int32_t>(outcome);
}

// Bytes of the structs that the caller fills in: Matrix, Layer, Model, Call, Blocks.
extern "C" void teal_cpu_struct_sizes(int64_t* sizes) {
  sizes[0] = sizeof(teal::Matrix);
  sizes[1] = sizeof(teal::Layer);
  sizes[2] = sizeof(teal::Model);
  sizes[3] = sizeof(teal::Call);
  sizes[4] = sizeof(teal::Blocks);
}
