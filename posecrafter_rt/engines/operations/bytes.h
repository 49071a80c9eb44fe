// Products in eight bits: rows of numbers from 0 to 255 times weights from -127 to 127, summed exactly in 32 bits, four
// of each lane at once by the processor's VNNI. Layer 4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "products.h"

#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define PC_HAS_VNNI
#endif

namespace posecrafter {

#ifdef PC_HAS_VNNI
constexpr bool kHasBytes = true;
#else
constexpr bool kHasBytes = false;
#endif

constexpr int kFour = 4;  // numbers of a row that a lane takes at once: a depth is a multiple

// Rows in eight bits: each is `segments` stretches of `depth` bytes, `pitch` apart, and stands for low + scale · byte,
// row r's being `step · r` from the first.
struct ByteRows {
    const uint8_t* first;
    size_t stride;
    int depth, segments;
    size_t pitch;
    const float *scale, *low;
    int step;

    ByteRows from(int row) const {
        ByteRows rows = *this;
        rows.first += row * stride, rows.scale += row * step, rows.low += row * step;
        return rows;
    }
};

// A panel of weights as `pack_bytes` writes it: what a byte of each column stands for, the columns' sums, and
// (depth / 4, kPanel, 4) bytes. The floats that it takes:
constexpr size_t byte_panel(int depth) { return 2 * kPanel + static_cast<size_t>(depth) * kPanel / sizeof(float); }

// weight (out, in, taps) → packed (out / panel, byte_panel), in the order (taps, in) of the rows' numbers.
void pack_bytes(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel);

// The least and the most of some numbers, or NaN where one is not finite.
struct Range {
    float low, high;
};

Range range_of(const float* x, int count);

// `count` rows of `depth` floats as bytes, each of one segment and with a scale of its own, in memory of this many
// floats.
ByteRows rows_to_bytes(Rows rows, int count, int depth, float* memory);

size_t byte_rows_floats(int count, int depth);

using Integers = int __attribute__((vector_size(kLanes * sizeof(int))));

// A vector's numbers as bytes: round(x · inverse + zero), from 0 to 255.
PC_INLINE void store_bytes(uint8_t* to, Vector x, float inverse, float zero) {
    using Bytes = uint8_t __attribute__((vector_size(kLanes)));
    const Vector nothing{}, most = nothing + 255.0f;
    Vector y = x * inverse + (zero + 0.5f);
    y = y > nothing ? y : nothing;
    y = y < most ? y : most;
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(y, Integers), Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
}

#ifdef PC_HAS_VNNI

// Adds to each lane the products of four numbers and its four weights.
PC_INLINE Integers dot(Integers sums, uint32_t four, const int8_t* weights) {
#ifdef __AVX512F__
    const __m512i left = _mm512_set1_epi32(static_cast<int>(four)), right = _mm512_loadu_si512(weights);
    return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), left, right));
#else
    const __m256i left = _mm256_set1_epi32(static_cast<int>(four));
    const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    return reinterpret_cast<Integers>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), left, right));
#endif
}

// kCount rows times a panel → out, rows of kPanel floats.
template <int kCount>
void multiply_bytes(const ByteRows& rows, const float* panel, Sums out, const Fetch& next) {
    constexpr int kStep = kFour * kLanes;
    const auto* weights = reinterpret_cast<const int8_t*>(panel + 2 * kPanel);
    Integers sums[kCount][2] = {};
    for (int segment = 0; segment < rows.segments; ++segment) {
        const uint8_t* first = rows.first + segment * rows.pitch;
        for (int k = 0; k < rows.depth; k += kFour, weights += 2 * kStep) {
            next.fetch((segment * rows.depth + k) / kFour);
#pragma GCC unroll 14
            for (int r = 0; r < kCount; ++r) {
                uint32_t four;
                std::memcpy(&four, first + r * rows.stride + k, sizeof four);
                sums[r][0] = dot(sums[r][0], four, weights);
                sums[r][1] = dot(sums[r][1], four, weights + kStep);
            }
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const Vector scale = load(panel + half * kLanes), sum = load(panel + kPanel + half * kLanes);
#pragma GCC unroll 14
        for (int r = 0; r < kCount; ++r) {
            const Vector product = __builtin_convertvector(sums[r][half], Vector) * scale;
            store(out.first + r * out.stride + half * kLanes,
                  product * rows.scale[r * rows.step] + sum * rows.low[r * rows.step]);
        }
    }
}

using MultiplyBytes = void (*)(const ByteRows&, const float*, Sums, const Fetch&);

template <int... kCounts>
constexpr std::array<MultiplyBytes, kRows> byte_multiplies(std::integer_sequence<int, kCounts...>) {
    return {multiply_bytes<kCounts + 1>...};
}

constexpr auto kMultiplyBytes = byte_multiplies(std::make_integer_sequence<int, kRows>());

#endif

// What products in eight bits are made of, for `Job` and `PictureOf`.
struct Bytes {
    using Number = uint8_t;
    using Numbers = ByteRows;
    static constexpr int kLighter = sizeof(float);  // how many times as light as a float a weight is

    static Numbers convert(Rows rows, int count, int depth, float* memory) {
        return rows_to_bytes(rows, count, depth, memory);
    }
    static size_t floats(int count, int depth) { return byte_rows_floats(count, depth); }

    // Of a panel of weights, in floats.
    static constexpr size_t panel(int depth) { return byte_panel(depth); }

    static void pack(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                     const Parallel& parallel) {
        pack_bytes(weight, in_channels, taps, out_channels, packed, parallel);
    }

    // In how many pieces a panel is multiplied: whole sums are exact.
    static int pieces(const Numbers&) { return 1; }

#ifdef PC_HAS_VNNI
    // Any number of rows times one panel.
    static void multiply(const Numbers& rows, int, int count, const float* panel, Sums sums, const Fetch& next) {
        for_blocks(count, [&](int begin, int some) {
            kMultiplyBytes[some - 1](rows.from(begin), panel, sums.from(begin), next.from(begin));
        });
    }
#endif
};

}  // namespace posecrafter
