// Products of integers with the processor's VNNI. Each lane takes as many numbers at once as 32 bits hold: four bytes,
// or two 16-bit words. Layer 4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "bytes.h"
#include "memory.h"

#ifdef PC_HAS_VNNI

namespace posecrafter {

// Adds to each lane the products of a group of a row's numbers (bytes or words) and as many weights of that lane.
template <class Number>
PC_INLINE Integers dot(Integers sums, uint32_t group, const void* weights) {
#ifdef __AVX512F__
    const __m512i to = reinterpret_cast<__m512i>(sums), left = _mm512_set1_epi32(static_cast<int>(group));
    const __m512i right = _mm512_loadu_si512(weights);
    return reinterpret_cast<Integers>(sizeof(Number) == 1 ? _mm512_dpbusd_epi32(to, left, right)
                                                          : _mm512_dpwssd_epi32(to, left, right));
#else
    const __m256i to = reinterpret_cast<__m256i>(sums), left = _mm256_set1_epi32(static_cast<int>(group));
    const __m256i right = _mm256_loadu_si256(static_cast<const __m256i*>(weights));
    return reinterpret_cast<Integers>(sizeof(Number) == 1 ? _mm256_dpbusd_avx_epi32(to, left, right)
                                                          : _mm256_dpwssd_avx_epi32(to, left, right));
#endif
}

// A row: where its numbers are, the scale and the low that they stand for (see `ScaledRows`), and where its sums go.
template <class Number>
struct Row {
    const Number* first;
    const float *scale, *low;
    float* to;
};

// The part of a row and of a panel that is multiplied before the next part. It begins at in_row and in_panel, and has
// `segments` stretches of `depth` numbers, which are `pitch` apart in the row. The first piece overwrites the sums,
// later ones add to them, and the last one scales them.
struct Piece {
    size_t in_row, in_panel;
    int depth, segments;
    size_t pitch;
    bool is_first, is_last;
};

// Multiplies kCount rows by a piece of a panel.
template <int kCount, class Number>
void multiply_block(const Row<Number>* rows, const Piece& piece, const float* panel, Ahead<char> ahead,
                    const Fetch& next) {
    constexpr size_t kVector = kLanes * sizeof(uint32_t);
    const char* weights = reinterpret_cast<const char*>(panel + 2 * kPanel) + piece.in_panel * sizeof(Number) * kPanel;
    Integers sums[kCount][2] = {};
    for (int segment = 0, step = 0; segment < piece.segments; ++segment) {
        const size_t first = piece.in_row + segment * piece.pitch;
        for (size_t k = first; k < first + piece.depth; k += kGroup<Number>, weights += 2 * kVector, ++step) {
            __builtin_prefetch(ahead.from, 0, 2);
            ahead.from += ahead.step;
            if (piece.is_last) next.fetch(step);
#pragma GCC unroll 14
            for (int r = 0; r < kCount; ++r) {
                uint32_t group;
                std::memcpy(&group, rows[r].first + k, sizeof group);
                sums[r][0] = dot<Number>(sums[r][0], group, weights);
                sums[r][1] = dot<Number>(sums[r][1], group, weights + kVector);
            }
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const Vector scale = load(panel + half * kLanes), sum = load(panel + kPanel + half * kLanes);
#pragma GCC unroll 14
        for (int r = 0; r < kCount; ++r) {
            float* to = rows[r].to + half * kLanes;
            Vector own = __builtin_convertvector(sums[r][half], Vector);
            if (!piece.is_first) own += load(to);
            store(to, piece.is_last ? scaled(own, scale, sum, *rows[r].scale, *rows[r].low) : own);
        }
    }
}

template <class Number>
using MultiplyBlock = void (*)(const Row<Number>*, const Piece&, const float*, Ahead<char>, const Fetch&);

template <class Number, int... kCounts>
constexpr std::array<MultiplyBlock<Number>, kRows> block_multiplies(std::integer_sequence<int, kCounts...>) {
    return {multiply_block<kCounts + 1, Number>...};
}

template <class Number>
constexpr auto kMultiplyBlock = block_multiplies<Number>(std::make_integer_sequence<int, kRows>());

// Multiplies any number of rows by one panel, piece by piece. A piece stays in the innermost cache while all rows pass
// by. What follows it is prefetched meanwhile, because weights come from memory. shape: any one of the rows.
template <class Format, class Number = typename Format::Number>
void multiply_listed(const Row<Number>* rows, int count, const ScaledRows<Number>& shape, const float* panel,
                     const Fetch& next) {
    constexpr size_t kDepthBytes = sizeof(Number) * kPanel;
    for (int index = 0; index < Format::pieces(shape); ++index) {
        const Piece piece = Format::piece(shape, index);
        const int depth = piece.depth * piece.segments;
        Ahead<char> ahead{reinterpret_cast<const char*>(panel + 2 * kPanel) + (piece.in_panel + depth) * kDepthBytes,
                          static_cast<size_t>(ceil_div(kGroup<Number> * kDepthBytes, ceil_div(count, kRows)))};
        for_blocks(count, [&](int begin, int some) {
            kMultiplyBlock<Number>[some - 1](rows + begin, piece, panel, ahead, next.from(begin));
            ahead.from += ahead.step * depth / kGroup<Number>;
        });
    }
}

inline thread_local Scratch thread_list;

template <class Number>
Row<Number>* room_for_list(int count) {
    return reinterpret_cast<Row<Number>*>(thread_list.take(count * sizeof(Row<Number>) / sizeof(float)));
}

// The same for rows at a constant distance.
template <class Format, class Number = typename Format::Number>
void multiply_by_vnni(const ScaledRows<Number>& rows, int count, const float* panel, Sums sums, const Fetch& next) {
    Row<Number>* list = room_for_list<Number>(count);
    for (int r = 0; r < count; ++r)
        list[r] = {rows.first + r * rows.stride, rows.scale + r * rows.step, rows.low + r * rows.step,
                   sums.from(r).first};
    multiply_listed<Format>(list, count, rows, panel, next);
}

}  // namespace posecrafter

#endif
