// Products of floats as pairs of 16-bit floats (bfloat16), with the processor's tiles (Intel AMX), summed in float32.
// The second part of a pair is what the first leaves of a number; a pair loses 2⁻¹⁸ of the number. The product of both
// second parts, 2⁻¹⁸ of the whole, is left out. Layer 4.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "memory.h"
#include "products.h"
#include "simd.h"
#include "tiles.h"

#ifdef PC_HAS_TILES

namespace posecrafter {

constexpr int kPairStep = kTileBytes / sizeof(uint16_t);  // numbers of a row that a tile takes
constexpr int kTileFloats = kTileRows * kTileBytes / sizeof(float);
constexpr size_t kPairTiles =
    size_t{4} * kTileFloats;  // a panel's floats for a step: both halves' first parts, then their second parts

constexpr int pair_depth(int numbers) { return ceil_div(numbers, kPairStep) * kPairStep; }

// A panel of weights has four tiles (step / 2, kLanes, 2) for each step of a row's numbers. Returns its size in floats.
constexpr size_t pair_panel(int numbers) { return pair_depth(numbers) / kPairStep * kPairTiles; }

PC_INLINE __m256i first_of_pair(Vector x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
PC_INLINE Vector float_of(__m256i half) {
    return reinterpret_cast<Vector>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Stores a vector's numbers: their first parts at `to`, their second parts `lower` after them.
PC_INLINE void store_pair(uint16_t* to, size_t lower, Vector x) {
    const __m256i high = first_of_pair(x), low = first_of_pair(x - float_of(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + lower), low);
}

// Rows of `depth` numbers, a multiple of kPairStep, `stride` apart; second parts are `lower` after the first.
struct PairRows {
    uint16_t* first;
    size_t stride, lower;
    int depth;

    // Writes `numbers` numbers, then zeros.
    void write(int row, const float* from, int numbers) const {
        for (int i = 0; i < depth; i += kLanes) store_pair(first + row * stride + i, lower, read(from, i, numbers));
    }
};

inline PairRows room_for_pairs(int count, int numbers, Scratch& scratch) {
    const int depth = pair_depth(numbers);
    const size_t lower = depth + kPairStep;  // the extra step keeps rows in different sets of the innermost cache
    return {reinterpret_cast<uint16_t*>(scratch.take(count * lower)), 2 * lower, lower, depth};
}

// Packs kLanes rows from `row` on as columns of panels.
inline void pack_pair_columns(const PairRows& rows, int row, float* packed) {
    const size_t stride = rows.stride / 2;  // in pairs of numbers, each as large as a float
    const auto* from = reinterpret_cast<const float*>(rows.first) + row * stride;
    float* to = packed + row / kPanel * pair_panel(rows.depth) + row % kPanel / kLanes * kTileFloats;
    for (int at = 0; at < rows.depth / 2; at += kColumns)
        for (int second = 0; second < 2; ++second) {
            Vector v[kColumns];
            read_columns(from + second * rows.lower / 2 + at, stride, kColumns, v);
            float* tile = to + at / kTileRows * kPairTiles + second * 2 * kTileFloats + at % kTileRows * kLanes;
            for (int i = 0; i < kColumns; ++i) store(tile + i * kLanes, v[i]);
        }
}

// Packs `count` rows as the numbers of one panel: their columns from `column` on. The rows have `columns` columns.
inline void pack_pairs_of_rows(Rows rows, int count, int column, int columns, float* packed) {
    const auto read_row = [&](int row, int at) {
        return row < count ? read(rows.first + row * rows.stride, at, columns) : Vector{};
    };
    const auto join = [](__m256i even, __m256i odd) {
        return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    };
    for (int row = 0; row < pair_depth(count); row += 2)
        for (int half = 0; half < 2; ++half) {
            const Vector even = read_row(row, column + half * kLanes), odd = read_row(row + 1, column + half * kLanes);
            const __m256i evens = first_of_pair(even), odds = first_of_pair(odd);
            float* to = packed + row / kPairStep * kPairTiles + half * kTileFloats + row % kPairStep / 2 * kLanes;
            _mm512_storeu_si512(to, join(evens, odds));
            _mm512_storeu_si512(to + 2 * kTileFloats,
                                join(first_of_pair(even - float_of(evens)), first_of_pair(odd - float_of(odds))));
        }
}

// Multiplies two groups of rows by a panel's first kVectors vectors and stores the sums.
template <int kVectors>
inline void multiply_pair_groups(const PairRows& rows, Groups groups, const float* panel, Sums out) {
    const uint16_t *upper = rows.first + groups.first * rows.stride, *lower = rows.first + groups.second * rows.stride;
    const size_t stride = rows.stride * sizeof(uint16_t), out_stride = out.stride * sizeof(float);
    zero_sums();
    for (int k = 0; k < rows.depth; k += kPairStep, panel += kPairTiles) {
        const auto multiply = [] {
            _tile_dpbf16ps(0, 4, 6);
            if (kVectors == 2) _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            if (kVectors == 2) _tile_dpbf16ps(3, 5, 7);
        };
        _tile_loadd(6, panel, kTileBytes);
        if (kVectors == 2) _tile_loadd(7, panel + kTileFloats, kTileBytes);
        _tile_loadd(4, upper + rows.lower + k, stride);
        _tile_loadd(5, lower + rows.lower + k, stride);
        multiply();
        _tile_loadd(4, upper + k, stride);
        _tile_loadd(5, lower + k, stride);
        multiply();
        _tile_loadd(6, panel + 2 * kTileFloats, kTileBytes);
        if (kVectors == 2) _tile_loadd(7, panel + 3 * kTileFloats, kTileBytes);
        multiply();
    }
    float *first = out.from(groups.first).first, *second = out.from(groups.second).first;
    _tile_stored(0, first, out_stride);
    if (kVectors == 2) _tile_stored(1, first + kLanes, out_stride);
    _tile_stored(2, second, out_stride);
    if (kVectors == 2) _tile_stored(3, second + kLanes, out_stride);
}

// Multiplies rows by a panel's first kVectors vectors, in pairs of groups like `multiply_tiles`.
template <int kVectors>
inline void multiply_pairs(const PairRows& rows, int count, const float* panel, Sums out) {
    const int pairs = ceil_div(count, 2 * kTileRows), height = ceil_div(count, 2 * pairs), last = count - height;
    shape_tiles(height);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // the compiler may not know that tiles read memory
    for (int pair = 0; pair < pairs; ++pair) {
        const int first = std::min(2 * pair * height, last);
        multiply_pair_groups<kVectors>(rows, {first, std::min(first + height, last)}, panel, out);
    }
    std::atomic_signal_fence(std::memory_order_seq_cst);
}

}  // namespace posecrafter

#endif
