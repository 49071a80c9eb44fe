// AMX in software, for a processor without it: what tiles.h and pairs.h ask of the processor, and of the system before
// that. Included before all else, with __AMX_INT8__ and __AMX_BF16__ defined.
#pragma once

#include <immintrin.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace amx {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

inline thread_local Shapes shapes{};
inline thread_local uint8_t tiles[kTiles][kRows][kBytes];

inline void load_shapes(const void* from) {
    std::memcpy(&shapes, from, sizeof shapes);
    std::memset(tiles, 0, sizeof tiles);
}

inline void store_shapes(void* to) { std::memcpy(to, &shapes, sizeof shapes); }

inline void zero(int tile) { std::memset(tiles[tile], 0, sizeof tiles[tile]); }

inline void load(int tile, const void* from, size_t stride) {
    zero(tile);
    for (int row = 0; row < shapes.rows[tile]; ++row)
        std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, shapes.row_bytes[tile]);
}

inline void store(int tile, void* to, size_t stride) {
    for (int row = 0; row < shapes.rows[tile]; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], shapes.row_bytes[tile]);
}

template <class Number>
Number number(int tile, int row, int index) {
    Number value;
    std::memcpy(&value, tiles[tile][row] + index * sizeof value, sizeof value);
    return value;
}

inline float of_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Adds to each number of a tile the products of a row of the left one and of numbers below each other of the right one.
template <class Sum, class Left, class Right, class Widen>
void multiply(int to, int left, int right, const Widen& widen) {
    constexpr int kGroup = sizeof(Sum) / sizeof(Left);
    for (int row = 0; row < shapes.rows[to]; ++row)
        for (int column = 0; column < static_cast<int>(shapes.row_bytes[to] / sizeof(Sum)); ++column) {
            Sum sum = number<Sum>(to, row, column);
            for (int k = 0; k < static_cast<int>(shapes.row_bytes[left] / sizeof(Sum)); ++k)
                for (int i = 0; i < kGroup; ++i)
                    sum += widen(number<Left>(left, row, k * kGroup + i)) *
                           widen(number<Right>(right, k, column * kGroup + i));
            std::memcpy(tiles[to][row] + column * sizeof sum, &sum, sizeof sum);
        }
}

inline void multiply_bytes(int to, int left, int right) {
    multiply<int, uint8_t, int8_t>(to, left, right, [](int value) { return value; });
}

inline void multiply_signed_bytes(int to, int left, int right) {
    multiply<int, int8_t, int8_t>(to, left, right, [](int value) { return value; });
}

inline void multiply_bfloat16(int to, int left, int right) {
    multiply<float, uint16_t, uint16_t>(to, left, right, [](uint16_t bits) { return of_bfloat16(bits); });
}

}  // namespace amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbusd
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig amx::load_shapes
#define _tile_storeconfig amx::store_shapes
#define _tile_loadd amx::load
#define _tile_stored amx::store
#define _tile_zero amx::zero
#define _tile_dpbusd amx::multiply_bytes
#define _tile_dpbssd amx::multiply_signed_bytes
#define _tile_dpbf16ps amx::multiply_bfloat16
#define syscall(...) 0  // the system lets this process use tiles
