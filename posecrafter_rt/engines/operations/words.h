// Means of values in integers of 16 bits: weights from 0 to 2¹⁴-1 times values of ten bits, two of each lane at once by
// the processor's VNNI, summed exactly over so many that 32 bits hold them. Layer 4.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "bytes.h"

#ifdef PC_HAS_VNNI

namespace posecrafter {

constexpr int kMostWeight = (1 << 14) - 1, kMostValue = (1 << 9) - 1;
constexpr int kPairs = 128;  // of weights that are summed at once: 2 · 128 · kMostWeight · kMostValue < 2³¹

// A panel of values: what a number of each column stands for, then (pairs, kPanel, 2) words. The floats that it takes:
constexpr size_t word_panel(int pairs) { return kPanel + static_cast<size_t>(pairs) * kPanel; }

// Adds to each lane the products of two numbers and its two values.
PC_INLINE Integers dot_words(Integers sums, uint32_t two, const int16_t* values) {
#ifdef __AVX512F__
    const __m512i left = _mm512_set1_epi32(static_cast<int>(two)), right = _mm512_loadu_si512(values);
    return reinterpret_cast<Integers>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums), left, right));
#else
    const __m256i left = _mm256_set1_epi32(static_cast<int>(two));
    const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return reinterpret_cast<Integers>(_mm256_dpwssd_avx_epi32(reinterpret_cast<__m256i>(sums), left, right));
#endif
}

// To the nearest whole numbers.
PC_INLINE Integers rounded(Vector x) {
#ifdef __AVX512F__
    return reinterpret_cast<Integers>(_mm512_cvtps_epi32(x));
#else
    return reinterpret_cast<Integers>(_mm256_cvtps_epi32(x));
#endif
}

// A vector's numbers, that fit, as words.
PC_INLINE void store_words(int16_t* to, Integers x) {
#ifdef __AVX512F__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#else
    const __m128i low = _mm256_castsi256_si128(reinterpret_cast<__m256i>(x));
    const __m128i high = _mm256_extracti128_si256(reinterpret_cast<__m256i>(x), 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(low, high));
#endif
}

// Rows of words, `stride` apart.
struct WordRows {
    const int16_t* first;
    size_t stride;
};

// kCount rows of `pairs` pairs times the first kVectors vectors of a panel → out, rows of kPanel floats.
template <int kCount, int kVectors>
void multiply_words(WordRows rows, const float* panel, int pairs, float* out) {
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
                for (int v = 0; v < kVectors; ++v) sums[r][v] = dot_words(sums[r][v], two, values + v * kStep);
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

using MultiplyWords = void (*)(WordRows, const float*, int, float*);

template <int kVectors, int... kCounts>
constexpr std::array<MultiplyWords, kRows> word_multiplies(std::integer_sequence<int, kCounts...>) {
    return {multiply_words<kCounts + 1, kVectors>...};
}

template <int kVectors>
constexpr auto kMultiplyWords = word_multiplies<kVectors>(std::make_integer_sequence<int, kRows>());

// Any number of rows times one panel.
template <int kVectors>
void multiply_word_rows(WordRows rows, int count, const float* panel, int pairs, float* out) {
    for_blocks(count, [&](int begin, int some) {
        const WordRows own{rows.first + begin * rows.stride, rows.stride};
        kMultiplyWords<kVectors>[some - 1](own, panel, pairs, out + begin* kPanel);
    });
}

}  // namespace posecrafter

#endif
