// Means of values in 16-bit integers: weights from 0 to 2¹⁴-1 times values of ten bits. Sums are exact over as many as
// 32 bits hold. Layer 4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "vnni.h"

#ifdef PC_HAS_VNNI

namespace posecrafter {

constexpr int kMostWeight = (1 << 14) - 1, kMostValue = (1 << 9) - 1;
constexpr int kPairs = 128;  // pairs of weights summed at once: 2 · 128 · kMostWeight · kMostValue < 2³¹

// A panel of values: each column's scale, then (pairs, kPanel, 2) words. Returns its size in floats.
constexpr size_t value_panel(int pairs) { return kPanel + static_cast<size_t>(pairs) * kPanel; }

// Rows of weights, `stride` apart.
struct WeightRows {
    const int16_t* first;
    size_t stride;
};

// Multiplies kCount rows of `pairs` pairs by the first kVectors vectors of a panel. out has rows of kPanel floats.
template <int kCount, int kVectors>
void sum_values(WeightRows rows, const float* panel, int pairs, float* out) {
    constexpr int kStep = 2 * kLanes;
    const auto* values = reinterpret_cast<const int16_t*>(panel + kPanel);
    for (int begin = 0; begin < pairs; begin += kPairs) {
        const int end = pairs < begin + kPairs ? pairs : begin + kPairs;
        Integers sums[kCount][kVectors] = {};
        for (int k = begin; k < end; ++k, values += 2 * kStep) {
#pragma GCC unroll 14
            for (int r = 0; r < kCount; ++r) {
                uint32_t two;
                std::memcpy(&two, rows.first + r * rows.stride + 2 * k, sizeof two);
#pragma GCC unroll 2
                for (int v = 0; v < kVectors; ++v) sums[r][v] = dot<int16_t>(sums[r][v], two, values + v * kStep);
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            const Vector scale = load(panel + v * kLanes);
#pragma GCC unroll 14
            for (int r = 0; r < kCount; ++r) {
                float* to = out + r * kPanel + v * kLanes;
                const Vector product = __builtin_convertvector(sums[r][v], Vector) * scale;
                store(to, begin == 0 ? product : load(to) + product);
            }
        }
    }
}

using SumValues = void (*)(WeightRows, const float*, int, float*);

template <int kVectors, int... kCounts>
constexpr std::array<SumValues, kRows> value_sums(std::integer_sequence<int, kCounts...>) {
    return {sum_values<kCounts + 1, kVectors>...};
}

template <int kVectors>
constexpr auto kSumValues = value_sums<kVectors>(std::make_integer_sequence<int, kRows>());

// Multiplies any number of rows by one panel.
template <int kVectors>
void sum_value_rows(WeightRows rows, int count, const float* panel, int pairs, float* out) {
    for_blocks(count, [&](int begin, int some) {
        const WeightRows own{rows.first + begin * rows.stride, rows.stride};
        kSumValues<kVectors>[some - 1](own, panel, pairs, out + begin* kPanel);
    });
}

}  // namespace posecrafter

#endif
