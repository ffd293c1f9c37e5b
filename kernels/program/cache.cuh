// The KV cache of one row, in the model's floats or in 8 bits (kernels/formats/kv_int8.py), and its tiles in registers.
//
//     lane 4 g + c    of keys: positions g and g + 8, channels 8 c to 8 c + 7 of every 32
//                     of values: positions 2 c, 2 c + 1, 2 c + 8, 2 c + 9, channels 8 g to 8 g + 7 of every 64
//
// Heads of fewer than 64 channels are read in narrower pieces. A tile of 8 bits is read whole before any of it becomes
// floats, so that all its loads are under way together.
#pragma once

constexpr int TILE = 16;  // positions
constexpr int KEY_WORDS = min_of(4, HEAD_DIM / 8), KEY_PIECES = HEAD_DIM / (8 * KEY_WORDS);  // of a lane and position
constexpr int VALUE_WORDS = min_of(4, HEAD_DIM / 16), VALUE_PIECES = HEAD_DIM / (16 * VALUE_WORDS);
// Warps that share a tile, each with its own pieces of the values. All sums of 128 channels would take registers that
// the loops over weights keep. Both multiply with the keys.
constexpr int TILE_WARPS = VALUE_PIECES > 1 ? 2 : 1, SEATS = WARPS / TILE_WARPS, OWN_PIECES = VALUE_PIECES / TILE_WARPS;

template <int BITS>
struct CacheElement {
    using Type = u16;
};
template <>
struct CacheElement<8> {
    using Type = u8;
};
using Cached = CacheElement<CACHE_BITS>::Type;
constexpr int CACHE_WIDTH = HEAD_DIM + (CACHE_BITS == 8 ? 16 : 0);  // of a vector; of 8 bits with its scale, fp32

template <class Element>
struct CacheOf {
    Element *k, *v;
    i64 layer, head, position;  // strides, in elements
};
using Cache = CacheOf<Cached>;

// A lane's part of the keys and values of 16 positions.
template <class Element>
struct TileOf {
    static constexpr bool PACKED = sizeof(Element) == 1;
    static constexpr int KEY_BYTES = 2 * KEY_WORDS * sizeof(Element), VALUE_BYTES = 2 * VALUE_WORDS * sizeof(Element);
    u32 keys[2][KEY_PIECES][ceil_div(KEY_BYTES, 4)], values[4][OWN_PIECES][ceil_div(VALUE_BYTES, 4)];
    float key_scales[2], value_scales[4];  // of bytes

    __device__ __forceinline__ static int first_piece() { return warp_of_block() % TILE_WARPS * OWN_PIECES; }
    __device__ __forceinline__ static int key_place(int i) { return 8 * i + lane_of_warp() / 4; }
    __device__ __forceinline__ static int value_place(int i) { return i / 2 * 8 + lane_of_warp() % 4 * 2 + i % 2; }

    // row(place) points to a position's vector, or is null, and nothing changes.
    template <class Row>
    __device__ __forceinline__ void read_keys(Row row) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Element* const from = row(key_place(i));
            if (!from) continue;
            if (PACKED) key_scales[i] = *(const float*)(from + HEAD_DIM);
#pragma unroll
            for (int j = 0; j < KEY_PIECES; j++)
                read_bytes<KEY_BYTES>(keys[i][j], from + 2 * KEY_WORDS * (4 * j + lane_of_warp() % 4));
        }
    }
    template <class Row>
    __device__ __forceinline__ void read_values(Row row) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Element* const from = row(value_place(i));
            if (!from) continue;
            if (PACKED) value_scales[i] = *(const float*)(from + HEAD_DIM);
#pragma unroll
            for (int j = 0; j < OWN_PIECES; j++)
                read_bytes<VALUE_BYTES>(values[i][j],
                                        from + 2 * VALUE_WORDS * (8 * (first_piece() + j) + lane_of_warp() / 4));
        }
    }
};
using Tile = TileOf<u16>;

// Pairs of floats of bytes times a scale, rounded as unpack_int8 does.
template <int PAIRS, int WORDS>
__device__ __forceinline__ void widen_bytes(u32 (&to)[PAIRS], const u32 (&from)[WORDS], float scale) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
        float x[2];
#pragma unroll
        for (int j = 0; j < 2; j++) x[j] = scale * signed_byte(from[i / 2], 2 * (i % 2) + j);
        to[i] = pair_of(x[0], x[1]);
    }
}

__device__ __forceinline__ const Tile& floats_of(const Tile& tile) { return tile; }
__device__ __forceinline__ Tile floats_of(const TileOf<u8>& packed) {
    Tile tile;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < KEY_PIECES; j++) widen_bytes(tile.keys[i][j], packed.keys[i][j], packed.key_scales[i]);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < OWN_PIECES; j++)
            widen_bytes(tile.values[i][j], packed.values[i][j], packed.value_scales[i]);
    return tile;
}

// A vector of floats as 8 bits keep it (pack_int8): to, unless that is null, and back into row. For one warp.
__device__ __forceinline__ void round_to_int8(u16 (&row)[ROW], u8* to) {
    float largest = 0.0f;
    bool bad = false;  // an Inf or NaN: all becomes NaN
    for (int d = lane_of_warp(); d < HEAD_DIM; d += 32) {
        const float x = float_of(row[d]);
        largest = fmaxf(largest, fabsf(x)), bad |= x * 0.0f != 0.0f;
    }
    largest = __uint_as_float(__reduce_max_sync(ALL_LANES, bad ? NAN_BITS : __float_as_uint(largest)));
    const float scale = largest / 127.0f;
    for (int d = lane_of_warp(); d < HEAD_DIM; d += 32) {
        const float q = scale > 0.0f ? rintf(float_of(row[d]) / scale) : 0.0f;  // a NaN is not above 0
        row[d] = bits_of(q * scale);
        if (to) to[d] = (u8)(int)q;
    }
    if (to && lane_of_warp() == 0) *(float*)(to + HEAD_DIM) = scale;
}
