// A whole decode step of one row as one cooperative launch: embedding, all blocks, and the head if it is wanted.
//
// One block a multiprocessor, from the first layer to the last. A layer:
//
//     phase        block's share                              then, through L2 (exchange.cuh)
//     ---------    ---------------------------------------    -------------------------------------------------
//     norm, list   its split of the channels of x             -
//     q, k, v      (piece of columns, split of channels)      partial sums > attention
//     attention    (key/value head, split of positions)       unnormalised sums > the splits of o
//     o            (piece of columns, split of channels)      partial sums > owners of columns > x
//     norm, list   its share of the channels of x             -
//     gate, up     (run of columns, share of channels)        sums > the blocks of a team
//     down         (rows of its team's h, run of columns)     partial sums > owners of columns > x
//
// Seven trips through L2, of which none is a grid barrier. What a layer of Llama-3-8B reads, in int4 at 50%: 109 MB / 2
// of weights by cp.async (gather.cuh). Then 2 MB of keys and values at 512 positions, and 7 MB of sums from L2.
//
// Some is known before x is, as scales of the next product's rows. It is asked for while a product's first rows are on
// their way, or during attention: then memory has little else to do.
//
// Straight code costs most of what is not bytes. Each warp issues each instruction, so that of 512 threads a thousand
// instructions are 2 us of a layer. Hence blocks of 256 where weights are small, loops that are not unrolled, and lists
// made by all threads.
//
// Of a model that several GPUs share, owners of columns also add up what the other GPUs have (exchange.cuh).
//
// The generated config (plan.py) says the model's shapes and how each product is cut; nothing here names a family.
#include "config.cuh"
#include "ptx.cuh"
#include "common.cuh"
#include "exchange.cuh"
#include "formats.cuh"
#include "gather.cuh"
#include "panel.cuh"
#include "shared.cuh"
#include "residual.cuh"
#include "product.cuh"
#include "cache.cuh"
#include "attention.cuh"
#include "mlp.cuh"
#include "head.cuh"

struct Words {  // offsets of what is exchanged in the workspace, in words; a four is two
    static constexpr i64 QKV_PARTS = 0, ATTENDED = QKV_PARTS + (i64)QKV_SPLITS * Qkv::N / 2;
    static constexpr i64 O_PARTS = ATTENDED + (i64)HEADS * ATTENTION_SPLITS * SLOT;
    static constexpr i64 DOWN_PARTS = O_PARTS + (i64)O_SPLITS * HIDDEN / 2;
    static constexpr i64 AFTER_O = DOWN_PARTS + (i64)MLP_TEAMS * HIDDEN / 2;  // x
    static constexpr i64 AFTER_DOWN = AFTER_O + 2 * residual::SENT, FOUND = AFTER_DOWN + 2 * residual::SENT;
    static constexpr i64 TEAMS = FOUND + 2 * GRID;
    static constexpr i64 END = TEAMS + (MLP_SHARE > 1 ? 4 * H_FOURS * MLP_BLOCKS : 0);
};
static_assert(Words::END <= WORKSPACE_WORDS, "plan.py and program.cu disagree about the workspace");

struct Arguments {
    const Layer* layers;
    const u8* embedding;       // [V, HIDDEN] of EMBEDDING_BITS
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

// A block's part of q, k and v: a piece of the columns, and every QKV_SPLITS-th run of channels.
struct QkvPart {
    static constexpr int PIECES = Qkv::GRANULES / QKV_PIECE, COUNT = ceil_div(QKV_CHANNELS / 4, THREADS);
    const int piece = blockIdx.x % PIECES, split = blockIdx.x / PIECES;
    const bool active = split < QKV_SPLITS;

    __device__ int channel(int i) const { return channel_of_part<Qkv, QKV_RUN, QKV_SPLITS, QKV_CHANNELS>(split, i); }
    __device__ int own(int i) const { return threadIdx.x + i * THREADS; }  // of its fours, that this thread lists
    __device__ int four(int i) const { return channel(4 * own(i)) / 4; }
    __device__ bool has(int i) const { return 4 * own(i) < QKV_CHANNELS && four(i) < HIDDEN / 4; }
};

// Of o: every O_SPLITS-th run.
struct OPart {
    static constexpr int PIECES = O::GRANULES / O_PIECE;
    const int piece = blockIdx.x % PIECES, split = blockIdx.x / PIECES;
    const bool active = split < O_SPLITS;

    __device__ int channel(int i) const { return channel_of_o(split, i); }
};

struct Step {
    const Arguments& a;
    Shared& s;
    float4 x;                               // of the residual stream, what this thread owns
    residual::Part<QkvPart::COUNT> inputs;  // of q, k and v
    Seconds<QKV_SECONDS, 4 * QkvPart::COUNT> seconds;
    int position, layer;
    u32 epoch, layers;  // layers: so far, with this one, of all launches

    __device__ u64* words(i64 offset) const { return a.words + offset; }
    __device__ uint4* fours(i64 offset) const { return (uint4*)words(offset); }

    __device__ void stamp(int part) const {
        if (a.stamps && threadIdx.x == 0) a.stamps[(layer * STAMPS + part) * GRID + blockIdx.x] = clock64();
    }

    // What the next layer's q, k and v want beside x.
    __device__ void fetch_for_qkv(const Layer& l) {
        const QkvPart part;
        if (!part.active) return;
        auto has = [&](int i) { return part.has(i); };
        inputs.load_weight(l.attention_norm, [&](int i) { return part.four(i); }, has);
        seconds.load(l.qkv, [&](int i) { return 4 * part.four(i); }, has);
        auto channel = [&](int i) { return part.channel(i); };
        fetch_panel<QkvPanel>(l.qkv, part.split, part.piece * QKV_PIECE, channel, s.qkv_panel);
    }
    __device__ void fetch_for_o(const Layer& l) {
        const OPart part;
        auto channel = [&](int i) { return part.channel(i); };
        if (part.active) fetch_panel<OPanel>(l.o, part.split, part.piece * O_PIECE, channel, s.o_panel);
    }

    __device__ void send_qkv(const Layer& l) {
        const QkvPart part;
        constexpr int COUNT = QkvPart::COUNT;
        const Turnstile turnstile{a.entered};
        if (!part.active) {
            turnstile.enter();  // reduce's barrier stands behind the last read of the layer before
            fetch_for_o(l);
            turnstile.pass(layers);
            __syncthreads();
            return;
        }
        auto has = [&](int i) { return part.has(i); };
        float y[4 * COUNT];
        inputs.receive_normed(y, fours(Words::AFTER_DOWN), [&](int i) { return part.four(i); }, has, epoch - 1, s);
        turnstile.enter();
        const int column = Qkv::column(part.piece * QKV_PIECE, 0);
        const float limit = s.limits[layer].qkv[column < Q_SIZE ? 0 : column < Q_SIZE + KV_SIZE ? 1 : 2];
        auto place = [&](int i) { return 4 * part.own(i / 4) + i % 4; };
        auto row = [&](int i) { return part.channel(place(i)); };
        const Listed listed = list_rows<QkvPanel>(y, kept(y, has, limit), row, place, seconds, s);
        stamp(1);
        auto meanwhile = [&] { fetch_for_o(l); };
        auto before_sending = [&] { turnstile.pass(layers); };
        product<QkvPanel, QKV_PIECE>(l.qkv, part.piece, s.qkv_panel, part.piece * QKV_PIECE, part.split, listed,
                                     fours(Words::QKV_PARTS), epoch, s, meanwhile, before_sending);
    }

    __device__ void attend(const Layer& l, Attention& attention) {
        attention.take_heads(l.qkv, fours(Words::QKV_PARTS), epoch, s);
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
        if (!part.active) return;
        const Listed listed =
            list_attended(l.o, words(Words::ATTENDED), attention_splits, s.limits[layer].o, part.split, epoch, s);
        stamp(5);
        product<OPanel, O_PIECE>(l.o, part.piece, s.o_panel, part.piece * O_PIECE, part.split, listed,
                                 fours(Words::O_PARTS), epoch, s, [] {}, [] {});
    }

    template <int SPLITS>
    __device__ void add_to_residual(const Matrix& m, i64 parts, i64 to, int which) {
        float4 sum = reduce<SPLITS>(fours(parts), epoch, s);
        if (residual::owns()) {
            const int column = 4 * residual::own_four();
            add_bias(sum, m, column);
            if (RANKS > 1) sum = sum_of_ranks(a.peers, which, column, sum, epoch);
            add_to(x, sum);
        }
        residual::send_own(x, fours(to), epoch);
    }

    __device__ void feed_forward(const Layer& l, const MlpInputs& inputs, const Layer& following) {
        auto meanwhile = [&] {
            if (layer + 1 < LAYERS) fetch_for_qkv(following);
        };
        if (!inputs.mlp.active) return meanwhile();
        const Limits& limits = s.limits[layer];
        const Listed listed = inputs.list(fours(Words::AFTER_O), limits, epoch, s);
        HiddenSeconds seconds;
        load_seconds(seconds, l.down);
        stamp(8);
        const float unscale = gate_and_up(l.gate_up, listed, limits, s);
        if (MLP_SHARE > 1) send_to_team(unscale, fours(Words::TEAMS), epoch, s);
        stamp(9);
        const Listed hidden = list_hidden(unscale, limits.down, seconds, fours(Words::TEAMS), epoch, s);
        ::down(l.down, hidden, fours(Words::DOWN_PARTS), epoch, s, meanwhile);
    }

    __device__ void run_layer() {
        const Layer& l = s.layers[layer % 2];
        Layer& following = s.layers[(layer + 1) % 2];
        const bool carries = threadIdx.x < LAYER_WORDS && layer + 1 < LAYERS;
        const u64 next = carries ? ((const u64*)(a.layers + layer + 1))[threadIdx.x] : 0;
        Attention attention;
        const bool attends = attention.place(position, (int)l.window);
        if (attends) attention.prefetch(a.cache, layer);
        stamp(0);
        send_qkv(l);
        if (carries) ((u64*)&following)[threadIdx.x] = next;
        stamp(2);
        if (attends) attend(l, attention);
        await_all_fetches();  // o's panel; the next ones are not to delay its list
        fetch_mlp_panel(l.gate_up, s);
        fetch_down_panel(l.down, s);
        stamp(4);
        send_o(l, attention.splits);
        stamp(6);
        MlpInputs mlp_inputs;
        mlp_inputs.load(l.ffn_norm, l.gate_up);
        add_to_residual<O_SPLITS>(l.o, Words::O_PARTS, Words::AFTER_O, 0);
        stamp(7);
        feed_forward(l, mlp_inputs, following);
        stamp(10);
        if (!MlpBlock().active) wait_idly(fours(Words::DOWN_PARTS) + idle_four(), epoch);
        add_to_residual<MLP_TEAMS>(l.down, Words::DOWN_PARTS, Words::AFTER_DOWN, 1);
        stamp(11);
    }

    // One that this block adds up; any, if it owns none.
    __device__ static int idle_four() {
        return (int)blockIdx.x < residual::OWNERS ? blockIdx.x * residual::OWN_FOURS : 0;
    }

    __device__ void finish() {
        if (a.hidden && residual::owns()) ((float4*)a.hidden)[residual::own_four()] = x;
        if (!a.logits) return;
        constexpr int COUNT = ceil_div(HIDDEN / 4, THREADS);
        auto four = [](int i) { return (int)threadIdx.x + i * THREADS; };
        auto has = [&](int i) { return four(i) < HIDDEN / 4; };
        residual::Part<COUNT> inputs;
        inputs.load_weight(a.norm, four, has);
        float y[4 * COUNT];
        inputs.receive_normed(y, fours(Words::AFTER_DOWN), four, has, epoch, s);
        Best best{NOTHING, VOCAB};
        if constexpr (HEAD_BITS == 16) {
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                if (has(i))
                    ((float4*)s.list_values)[four(i)] = make_float4(y[4 * i], y[4 * i + 1], y[4 * i + 2], y[4 * i + 3]);
            __syncthreads();
            float_head(a.head, s.list_values, a.logits, best);
        } else {
            auto row = [&](int i) { return 4 * four(i / 4) + i % 4; };
            Seconds<HEAD_SECONDS, 4 * COUNT> seconds;
            seconds.load(a.head, [&](int i) { return 4 * four(i); }, has);
            const u32 all = kept(y, has, 0.0f);
            const Listed listed = list_rows<HEAD_BITS, HIDDEN, false, true>(y, all, row, row, seconds, s);
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
    step.epoch = first_epoch(launches);
    step.x = residual::load_own(a.embedding, *a.token);
    residual::send_own(step.x, step.fours(Words::AFTER_DOWN), step.epoch);
    __syncthreads();
    step.fetch_for_qkv(s.layers[0]);
    for (step.layer = 0; step.layer < LAYERS; step.layer++) {
        step.epoch++;
        step.layers = launches * LAYERS + step.layer + 1;
        step.run_layer();
    }
    step.finish();
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.launches = launches + 1;
}
