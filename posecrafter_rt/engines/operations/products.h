// The innermost loop of every float32 matrix product: some rows times one panel of weights (floats or halves), with
// sums kept in registers. Layer 4.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "parallel.h"
#include "simd.h"

namespace posecrafter {

constexpr int kPanel = 2 * kLanes;            // output channels of the innermost loop: a panel
constexpr int kRows = kLanes == 16 ? 14 : 6;  // rows that it computes at once: as many as registers hold

// Where rows are, and the distance from one to the next, in floats.
struct Rows {
    const float* first;
    size_t stride;
};

// Where sums go, a panel's for each row, and the distance from one row to the next, in floats.
struct Sums {
    float* first;
    size_t stride;

    Sums from(int row) const { return {first + row * stride, stride}; }
};

// What is prefetched while a panel is multiplied: the memory that is written afterwards, and `other`, which is added to
// it. That is `lines` cache lines (a power of two), `step` floats apart, and if `is_wide` also the line after each. Row
// r begins `row · r` floats after `first`.
struct Fetch {
    const float *first, *other;
    size_t step, row;
    int lines;
    bool is_wide;

    // Nothing to prefetch: an address that exists and is in the cache.
    static Fetch nothing(const float* there) { return {there, there, 0, 0, 1, false}; }

    Fetch from(int index) const {
        Fetch next = *this;
        next.first += index * row, next.other += index * row;
        return next;
    }

    // Prefetches line k; each product counts k = 0, 1 … Each line is fetched once, because more fetches would compete
    // with what the product streams through.
    PC_INLINE void fetch(int k) const {
        if (k >= kPanel) return;
        const size_t at = (k & (lines - 1)) * step + (is_wide && (k & lines) != 0 ? 64 / sizeof(float) : 0);
        __builtin_prefetch(first + at, 1);
        __builtin_prefetch(other + at);
    }
};

// Calls use(begin, rows) for blocks of at most kRows rows. Blocks are of nearly equal size, because a short one leaves
// lanes idle.
template <class Use>
PC_INLINE void for_blocks(int count, const Use& use) {
    const int blocks = ceil_div(count, kRows);
    for (int block = 0; block < blocks; ++block) {
        const int begin = count * block / blocks;
        use(begin, count * (block + 1) / blocks - begin);
    }
}

// What is read next and prefetched meanwhile: from where, and how much of it with each number of a row. Panels come
// from memory, or from a cache that all cores share, and are used up before the next one would arrive by itself.
template <class Number>
struct Ahead {
    const Number* from;
    size_t step;
};

// Multiplies kCount rows of `depth` numbers by the first kVectors vectors of a panel (depth, kPanel). out has kCount
// rows of kVectors vectors. kIsMore: adds to what is there.
template <int kCount, bool kIsMore, int kVectors, class Number>
void multiply(Rows rows, const Number* panel, int depth, float* out, size_t out_stride, Ahead<Number> ahead) {
    Vector sums[kCount][kVectors] = {};
    if (kIsMore)
#pragma GCC unroll 14
        for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[r][v] = load(out + r * out_stride + v * kLanes);
    for (int k = 0; k < depth; ++k) {
        __builtin_prefetch(ahead.from + k * ahead.step, 0, 2);
        __builtin_prefetch(rows.first + kCount * rows.stride + k * kCount);  // the next rows, if they follow
        Vector weights[kVectors];
        for (int v = 0; v < kVectors; ++v) weights[v] = load(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 14
        for (int r = 0; r < kCount; ++r) {
            const float value = rows.first[r * rows.stride + k];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[r][v] += value * weights[v];
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

template <class Number>
using Multiply = void (*)(Rows, const Number*, int, float*, size_t, Ahead<Number>);

template <bool kIsMore, int kVectors, class Number, int... kCounts>
constexpr std::array<Multiply<Number>, kRows> multiplies(std::integer_sequence<int, kCounts...>) {
    return {multiply<kCounts + 1, kIsMore, kVectors, Number>...};
}

// Indexed by the number of rows, minus one.
template <bool kIsMore, int kVectors, class Number>
constexpr auto kMultiply = multiplies<kIsMore, kVectors, Number>(std::make_integer_sequence<int, kRows>());

// Multiplies any number of rows by one panel, which another follows.
template <bool kIsMore = false, int kVectors = 2, class Number>
void multiply_rows(Rows rows, int count, const Number* panel, int depth, float* out, size_t out_stride) {
    const size_t step = ceil_div(kPanel, ceil_div(count, kRows));
    Ahead<Number> ahead{panel + static_cast<size_t>(depth) * kPanel, step};
    for_blocks(count, [&](int begin, int some) {
        const Rows own{rows.first + begin * rows.stride, rows.stride};
        kMultiply<kIsMore, kVectors, Number>[some - 1](own, panel, depth, out + begin* out_stride, out_stride, ahead);
        ahead.from += step * depth;
    });
}

constexpr int kDepth = 512;  // numbers multiplied at once, so that a panel stays in the innermost cache

// The same for any depth; nothing need follow the panel.
template <int kVectors = 2, class Number>
void multiply_deep_rows(Rows rows, int count, const Number* panel, int depth, float* out, size_t out_stride) {
    for (int k = 0; k < depth; k += kDepth) {
        const Rows own{rows.first + k, rows.stride};
        const int part = depth - k < kDepth ? depth - k : kDepth;
        const auto multiply = k == 0 ? multiply_rows<false, kVectors, Number> : multiply_rows<true, kVectors, Number>;
        multiply(own, count, panel + static_cast<size_t>(k) * kPanel, part, out, out_stride);
    }
}

}  // namespace posecrafter
