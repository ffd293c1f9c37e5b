// A whole decode step of one row as one cooperative launch: embedding, all blocks, and the head if it is wanted.
//
// One block a multiprocessor, from the first layer to the last. A layer:
//
//     phase        block's share                              then, through L2 (exchange.cuh)
//     ---------    ---------------------------------------    -------------------------------------------------
//     norm, list   all of x; its split of the channels        -
//     q, k, v      (piece of columns, split of channels)      partial sums > attention
//     attention    (key/value head, split of positions)       unnormalised sums > the splits of o
//     o            (piece of columns, split of channels)      partial sums > reducers > x of all blocks
//     norm, list   all of x; its share of the channels        -
//     gate, up     (run of columns, share of channels)        sums > the blocks of a team
//     down         (rows of its team's h, run of columns)     partial sums > reducers > x of all blocks
//
// Seven trips through L2, of which none is a grid barrier. What a layer reads, Llama-3-8B in int4 at 50%: 109 MB / 2 of
// weights by cp.async (gather.cuh), 2 MB of keys and values at 512 positions, and about 20 MB of words from L2.
//
// Straight code costs most of what is not bytes: each warp issues each instruction, so that of 512 threads a thousand
// instructions are 2 us of a layer. Hence blocks of 256 where weights are small, loops that are not unrolled, and lists
// made by all threads.
//
// Of a model that several GPUs share, reducers of o and down also add up what the other GPUs have (exchange.cuh).
//
// The generated config (plan.py) says the model's shapes and how each product is cut; nothing here names a family.
#include "config.cuh"
#include "ptx.cuh"
#include "common.cuh"
#include "exchange.cuh"
#include "formats.cuh"
#include "gather.cuh"
#include "shared.cuh"
#include "residual.cuh"
#include "product.cuh"
#include "cache.cuh"
#include "attention.cuh"
#include "mlp.cuh"
#include "head.cuh"

struct Words {  // offsets of the exchanged vectors in the workspace, in words
    static constexpr i64 QKV_PARTS = 0, ATTENDED = QKV_PARTS + (i64)QKV_SPLITS * Qkv::N;
    static constexpr i64 O_PARTS = ATTENDED + (i64)HEADS * ATTENTION_SPLITS * SLOT;
    static constexpr i64 O = O_PARTS + (i64)O_SPLITS * HIDDEN, DOWN_PARTS = O + HIDDEN;
    static constexpr i64 DOWN = DOWN_PARTS + (i64)MLP_TEAMS * HIDDEN, FOUND = DOWN + HIDDEN, TEAMS = FOUND + 2 * GRID;
    static constexpr i64 END = TEAMS + (MLP_SHARE > 1 ? 4 * H_PAIRS * MLP_BLOCKS : 0);
};
static_assert(Words::END <= WORKSPACE_WORDS, "plan.py and program.cu disagree about the workspace");

struct Arguments {
    const Layer* layers;
    const u16* embedding;
    const float* frequencies;  // of the rotary embedding, [HEAD_DIM / 2]
    const u16* norm;
    Matrix head;
    Cache cache;
    u64* words;
    u32* launches;  // of this program so far
    u32* entered;   // Turnstile's counter
    const i64* token;
    i64* position;
    float* hidden;      // fp32 [HIDDEN], or null
    float* logits;      // fp32 [VOCAB], or null: without the head
    i64* next_token;    // or null
    i64* stamps;        // clocks at the end of each part of each layer, [LAYERS][STAMPS][GRID], or null
    u64* const* peers;  // words of all ranks that share the model (exchange.cuh), or null
};
constexpr int STAMPS = 12;

// A block's part of q, k and v: a piece of the columns, and every QKV_SPLITS-th pair of channels.
struct QkvPart {
    static constexpr int PIECES = Qkv::GRANULES / QKV_PIECE, COUNT = ceil_div(QKV_CHANNELS, THREADS);
    const int piece = blockIdx.x % PIECES, split = blockIdx.x / PIECES;
    const int first_group = piece * QKV_PIECE / Qkv::GRANULES_OF_GROUP;

    __device__ int channel(int i) const { return 2 * (i / 2 * QKV_SPLITS + split) + i % 2; }
    __device__ int own(int i) const { return threadIdx.x + i * THREADS; }
    __device__ bool has(int i) const { return own(i) < QKV_CHANNELS && channel(own(i)) < HIDDEN; }
};

// Of o.
struct OPart {
    static constexpr int PIECES = O::GRANULES / O_PIECE;
    const int piece = blockIdx.x % PIECES, split = blockIdx.x / PIECES;
    const int first_group = piece * O_PIECE / O::GRANULES_OF_GROUP;

    __device__ int channel(int i) const { return 2 * (i / 2 * O_SPLITS + split) + i % 2; }
};

struct Step {
    const Arguments& a;
    Shared& s;
    float squares;               // of this thread's channels of x
    u16 weight[QkvPart::COUNT];  // of the next norm before q, k and v
    int position, layer;
    u32 epoch;

    __device__ u64* words(i64 offset) const { return a.words + offset; }

    __device__ void stamp(int part) const {
        if (a.stamps && threadIdx.x == 0) a.stamps[(layer * STAMPS + part) * GRID + blockIdx.x] = clock64();
    }

    __device__ void load_weight(const Layer& l) {
        const QkvPart part;
#pragma unroll
        for (int i = 0; i < QkvPart::COUNT; i++)
            weight[i] = part.has(i) ? l.attention_norm[part.channel(part.own(i))] : 0;
    }

    __device__ void send_qkv(const Layer& l) {
        const QkvPart part;
        constexpr int COUNT = QkvPart::COUNT;
        const float scale = residual::norm_scale(squares, s);
        const Turnstile turnstile{a.entered};
        turnstile.enter();  // norm_scale's barrier stands behind the last read of the layer before
        if (part.split >= QKV_SPLITS) {
            turnstile.pass(epoch);
            __syncthreads();
            return;
        }
        const int column = Qkv::column(part.piece * QKV_PIECE, 0);
        const float limit = s.limits[layer].qkv[column < Q_SIZE ? 0 : column < Q_SIZE + KV_SIZE ? 1 : 2];
        float y[COUNT];
        u32 keep = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            y[i] = part.has(i) ? residual::normed(s.x[part.channel(part.own(i))], scale, float_of(weight[i])) : 0.0f;
            if (part.has(i) && is_kept(y[i], limit)) keep |= 1u << i;
        }
        auto row = [&](int i) { return part.channel(part.own(i)); };
        auto place = [&](int i) { return part.own(i); };
        const Listed listed = compact<Qkv>(y, keep, row, place, s);
        stamp(1);
        product<Qkv, QKV_PIECE, QKV_CHANNELS>(l.qkv, part.piece, part.first_group, part.split, listed,
                                              words(Words::QKV_PARTS), epoch, s, [&] { turnstile.pass(epoch); });
    }

    __device__ void fetch_qkv_panel(const Layer& l) {
        const QkvPart part;
        auto channel = [&](int i) { return part.channel(i); };
        if (part.split < QKV_SPLITS) fetch_panel<Qkv, QKV_GROUPS, QKV_CHANNELS>(l.qkv, part.first_group, channel, s);
    }
    __device__ void fetch_o_panel(const Layer& l) {
        const OPart part;
        auto channel = [&](int i) { return part.channel(i); };
        if (part.split < O_SPLITS) fetch_panel<O, O_GROUPS, O_CHANNELS>(l.o, part.first_group, channel, s);
    }

    __device__ void attend(const Layer& l, Attention& attention) {
        attention.take_heads(l.qkv, words(Words::QKV_PARTS), epoch, s);
        stamp(3);
        attention.rotate(l.q_norm, l.k_norm, s);
        attention.store_new(a.cache, layer, s);
        Running run;
        attention.attend(run, a.cache, layer, s);
        attention.send_seen(run, words(Words::ATTENDED), epoch, s);
        __syncthreads();
    }

    __device__ void send_o(const Layer& l, int attention_splits) {
        const OPart part;
        if (part.split >= O_SPLITS) return;
        const Listed listed =
            list_attended(words(Words::ATTENDED), attention_splits, s.limits[layer].o, part.split, epoch, s);
        stamp(5);
        product<O, O_PIECE, O_CHANNELS>(l.o, part.piece, part.first_group, part.split, listed, words(Words::O_PARTS),
                                        epoch, s, [] {});
    }

    template <int SPLITS>
    __device__ void reduce_to_residual(const Matrix& m, i64 parts, i64 to, int which) {
        reduce<HIDDEN, SPLITS>(words(parts), epoch, s, [&](int column, float2 sum) {
            sum.x += bias_of(m, column), sum.y += bias_of(m, column + 1);
            if (RANKS > 1) sum = sum_of_ranks(a.peers, which, column, sum, epoch);
            send(words(to) + column, sum.x, sum.y, epoch);
        });
        squares = residual::add(words(to), epoch, s);
    }

    __device__ void feed_forward(const Layer& l, const u32 (&weight)[MLP_PAIRS]) {
        if (!MlpBlock().active) return;
        const Limits& limits = s.limits[layer];
        const Listed inputs = list_inputs(weight, residual::norm_scale(squares, s), limits, s);
        stamp(8);
        const float unscale = gate_and_up(l.gate_up, inputs, limits, s);
        if (MLP_SHARE > 1) send_to_team(unscale, words(Words::TEAMS), epoch, s);
        stamp(9);
        const Listed hidden = list_hidden(unscale, limits.down, words(Words::TEAMS), epoch, s);
        ::down(l.down, hidden, words(Words::DOWN_PARTS), epoch, s);
    }

    __device__ void run_layer() {
        const Layer& l = s.layers[layer % 2];
        const bool carries = threadIdx.x < LAYER_WORDS && layer + 1 < LAYERS;
        const u64 next = carries ? ((const u64*)(a.layers + layer + 1))[threadIdx.x] : 0;
        Attention attention;
        const bool attends = attention.place(position, (int)l.window);
        if (attends) attention.prefetch(a.cache, layer);
        stamp(0);
        send_qkv(l);
        fetch_o_panel(l);
        fetch_mlp_panel(l.gate_up, s);
        stamp(2);
        if (attends) attend(l, attention);
        stamp(4);
        send_o(l, attention.splits);
        fetch_down_panel(l.down, s);
        stamp(6);
        u32 ffn_weight[MLP_PAIRS];
        load_mlp_weight(ffn_weight, l.ffn_norm);
        reduce_to_residual<O_SPLITS>(l.o, Words::O_PARTS, Words::O, 0);
        stamp(7);
        feed_forward(l, ffn_weight);
        stamp(10);
        if (!MlpBlock().active) wait_idly(words(Words::DOWN_PARTS) + 2 * blockIdx.x, epoch);
        Layer& following = s.layers[(layer + 1) % 2];
        if (carries) ((u64*)&following)[threadIdx.x] = next;
        __syncthreads();
        if (layer + 1 < LAYERS) load_weight(following), fetch_qkv_panel(following);
        reduce_to_residual<MLP_TEAMS>(l.down, Words::DOWN_PARTS, Words::DOWN, 1);
        stamp(11);
    }

    __device__ void finish() {
        if (a.hidden && blockIdx.x == 0)
            for (int i = threadIdx.x; i < HIDDEN / 2; i += THREADS) ((float2*)a.hidden)[i] = ((const float2*)s.x)[i];
        if (!a.logits) return;
        u32 weight[X_PAIRS];
        residual::load_weight(weight, a.norm);
        float y[2 * X_PAIRS];
        residual::normed_pairs(y, weight, residual::norm_scale(squares, s), s);
        Best best{NOTHING, VOCAB};
        if constexpr (HEAD_BITS == 16) {
#pragma unroll
            for (int i = 0; i < X_PAIRS; i++)
                if (residual::has(i)) ((float2*)s.list_values)[residual::pair(i)] = make_float2(y[2 * i], y[2 * i + 1]);
            __syncthreads();
            float_head(a.head, s.list_values, a.logits, best);
        } else {
            auto row = [](int i) { return residual::channel(i); };
            const Listed listed = compact<false, Head::BITS == 4>(y, residual::kept(y, 0.0f), row, row, s);
            quantized_head<Head>(a.head, a.logits, best, listed, s);
        }
        if (a.next_token) take_token(best, words(Words::FOUND), a.next_token, a.position, epoch, s);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(const __grid_constant__ Arguments a) {
    Shared& s = *(Shared*)shared_memory();
    Step step{a, s};
    step.position = (int)*a.position;
    const u32 launches = *(volatile u32*)a.launches;
    for (int d = threadIdx.x; d < HEAD_DIM / 2; d += THREADS)
        sincosf(step.position * a.frequencies[d], &s.sines[d], &s.cosines[d]);
    if (threadIdx.x < LAYER_WORDS) ((u64*)s.layers)[threadIdx.x] = ((const u64*)a.layers)[threadIdx.x];
    load_limits(a.layers, s);
    step.squares = residual::load(a.embedding + *a.token * HIDDEN, s);
    __syncthreads();
    step.load_weight(s.layers[0]);
    step.fetch_qkv_panel(s.layers[0]);
    for (step.layer = 0; step.layer < LAYERS; step.layer++) {
        step.epoch = launches * LAYERS + step.layer + 1;
        step.run_layer();
    }
    step.finish();
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.launches = launches + 1;
}
