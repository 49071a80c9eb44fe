// Numbers and weights in 16 bits: rows of numbers from -kMostNumber to kMostNumber, and panels of weights. The
// processor's VNNI multiplies two in each lane at once. Sums over stretches are exact in 32 bits; sums of these are in
// float32. Layer 4.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "bytes.h"

#ifdef PC_HAS_VNNI

namespace posecrafter {

constexpr int kTwo = kGroup<int16_t>;
constexpr int kStretch = 128;  // products summed in 32 bits; more would leave fewer bits to the weights
constexpr int kMostNumber = (1 << 13) - 1;
constexpr int kMostSum = INT_MAX / kMostNumber;  // of the magnitudes of a stretch's weights

// The count of numbers that are multiplied: odd rows and weights are padded with a zero.
constexpr int word_depth(int numbers) { return ceil_div(numbers, kTwo) * kTwo; }

using WordRows = ScaledRows<int16_t>;

// A panel of weights as `pack_words` writes it: each column's scale, each column's sum of what its words stand for,
// then (depth / 2, kPanel, 2) words. Returns its size in floats for `numbers` numbers.
constexpr size_t word_panel(int numbers) {
    return 2 * kPanel + static_cast<size_t>(word_depth(numbers)) * kPanel / (sizeof(float) / sizeof(int16_t));
}

// Packs weight (out, in, taps) as (out / panel, word_panel), in the order of the rows' numbers: (taps, word_depth(in)).
void pack_words(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel);

// Like `rows_to_bytes`, in `memory` of word_rows_floats floats.
WordRows rows_to_words(Rows rows, int count, int numbers, float* memory);

size_t word_rows_floats(int count, int numbers);

// Rounds to the nearest integers.
PC_INLINE Integers rounded(Vector x) {
#ifdef __AVX512F__
    return reinterpret_cast<Integers>(_mm512_cvtps_epi32(x));
#else
    return reinterpret_cast<Integers>(_mm256_cvtps_epi32(x));
#endif
}

// Stores integers, which must fit, as words.
PC_INLINE void store_words(int16_t* to, Integers x) {
#ifdef __AVX512F__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
#else
    const __m128i low = _mm256_castsi256_si128(reinterpret_cast<__m256i>(x));
    const __m128i high = _mm256_extracti128_si256(reinterpret_cast<__m256i>(x), 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(low, high));
#endif
}

// Stores a vector's numbers in 16 bits: round(x · inverse + zero), limited to -kMostNumber … kMostNumber.
PC_INLINE void store_whole(int16_t* to, Vector x, float inverse, float zero) {
    const Vector most = Vector{} + static_cast<float>(kMostNumber);
    const Vector y = larger(x * inverse + zero, -most);
    store_words(to, rounded(y < most ? y : most));
}

}  // namespace posecrafter

#endif
