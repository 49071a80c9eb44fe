// Products in 16 bits, IEEE 754's binary16, of which a processor with AVX512-FP16 does twice as many as of floats: sums
// are in 16 bits over stretches, and of those in 32. Layer 4.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "linear.h"
#include "products.h"

#ifdef __AVX512FP16__
#define PC_HAS_HALVES
#endif

namespace posecrafter {

#ifdef PC_HAS_HALVES
constexpr bool kHasHalves = true;
#else
constexpr bool kHasHalves = false;
#endif

constexpr int kPiece = 256;   // rows of a panel that are multiplied by all numbers before others are
constexpr int kStretch = 64;  // products that are summed in 16 bits: as many as weights, they add 1e-3 of a sum

// Rows in 16 bits: each is `segments` stretches of `depth` numbers, `pitch` apart.
struct HalfRows {
    const Half* first;
    size_t stride;
    int depth, segments;
    size_t pitch;

    HalfRows from(int row) const { return {first + row * stride, stride, depth, segments, pitch}; }
};

// `count` rows of `depth` floats in 16 bits, each of one segment, in memory of this many floats.
HalfRows rows_to_halves(Rows rows, int count, int depth, float* memory);

size_t half_rows_floats(int count, int depth);

#ifdef PC_HAS_HALVES

// Adds a panel's row of sums in 16 bits to one in 32, or puts it there.
PC_INLINE void add_panel_row(float* to, __m512h v, bool is_first) {
    const __m512i halves = _mm512_castph_si512(v);
    const Vector parts[] = {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part, to += kLanes) {
        const Vector own = parts[part];
        store(to, is_first ? own : own + load(to));
    }
}

// kCount rows, `stride` apart, of `depth` numbers times as many rows of a panel, added to sums or put there.
template <int kCount>
void multiply_halves(const Half* rows, size_t stride, const Half* panel, int depth, Sums sums, bool is_first) {
    for (int begin = 0; begin < depth; begin += kStretch, is_first = false) {
        const int end = depth < begin + kStretch ? depth : begin + kStretch;
        __m512h own[kCount] = {};
        for (int k = begin; k < end; ++k, panel += kPanel) {
            const __m512h weights = _mm512_loadu_ph(panel);
#pragma GCC unroll 14
            for (int r = 0; r < kCount; ++r) {
                _Float16 number;
                __builtin_memcpy(&number, rows + r * stride + k, sizeof number);
                own[r] = _mm512_fmadd_ph(_mm512_set1_ph(number), weights, own[r]);
            }
        }
#pragma GCC unroll 14
        for (int r = 0; r < kCount; ++r) add_panel_row(sums.first + r * sums.stride, own[r], is_first);
    }
}

using MultiplyHalves = void (*)(const Half*, size_t, const Half*, int, Sums, bool);

template <int... kCounts>
constexpr std::array<MultiplyHalves, kRows> half_multiplies(std::integer_sequence<int, kCounts...>) {
    return {multiply_halves<kCounts + 1>...};
}

constexpr auto kMultiplyHalves = half_multiplies(std::make_integer_sequence<int, kRows>());

#endif

// What products in 16 bits are made of, for `Job` and `PictureOf`.
struct Halves {
    using Number = Half;
    using Numbers = HalfRows;
    static constexpr int kLighter = sizeof(float) / sizeof(Half);  // how many times as light as a float a weight is

    static Numbers convert(Rows rows, int count, int depth, float* memory) {
        return rows_to_halves(rows, count, depth, memory);
    }
    static size_t floats(int count, int depth) { return half_rows_floats(count, depth); }

    // How many numbers a pixel of so many channels takes.
    static constexpr int depth(int channels) { return channels; }

    // Of a panel of weights, in floats.
    static constexpr size_t panel(int depth) { return static_cast<size_t>(depth) * kPanel / kLighter; }

    static void pack(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                     const Parallel& parallel) {
        linear_pack(weight, in_channels, out_channels, reinterpret_cast<Half*>(packed), parallel, taps);
    }

    static bool is_tiled() { return false; }

    // In how many pieces a panel is multiplied, so that each stays in the innermost cache while all rows pass by.
    static int pieces(const Numbers& rows) { return rows.segments * ceil_div(rows.depth, kPiece); }

    // Where a piece begins, in a row and in a panel, and how many numbers of a row are in it.
    struct Piece {
        size_t in_row, in_panel;
        int depth;
    };

    static Piece piece(const Numbers& rows, int index) {
        const int per_segment = ceil_div(rows.depth, kPiece), begin = index % per_segment * kPiece;
        const size_t segment = index / per_segment;
        return {segment * rows.pitch + begin, segment * rows.depth + begin,
                rows.depth - begin < kPiece ? rows.depth - begin : kPiece};
    }

#ifdef PC_HAS_HALVES
    // Any number of rows times one piece of a panel: the first one's products go to sums, others' are added.
    static void multiply(const Numbers& rows, int index, int count, const float* panel, Sums sums, const Fetch&) {
        const Piece own = piece(rows, index);
        for_blocks(count, [&](int row, int some) {
            multiply_block(rows.first + row * rows.stride + own.in_row, rows.stride, own, some, panel, sums.from(row),
                           index == 0);
        });
    }

    // A block of them, of which a piece's numbers are `stride` apart from `first` on.
    static void multiply_block(const Half* first, size_t stride, Piece own, int count, const float* panel, Sums sums,
                               bool is_first) {
        const Half* weights = reinterpret_cast<const Half*>(panel) + own.in_panel * kPanel;
        kMultiplyHalves[count - 1](first, stride, weights, own.depth, sums, is_first);
    }
#endif
};

}  // namespace posecrafter
