// Numbers and weights in 16 bits: rows of numbers from -kMostNumber to kMostNumber and panels of weights, two of each
// lane multiplied at once by the processor's VNNI. Sums are exact in 32 bits over stretches, and of those in float32.
// Layer 4.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "bytes.h"

#ifdef PC_HAS_VNNI

namespace posecrafter {

constexpr int kTwo = kGroup<int16_t>;
constexpr int kStretch = 128;  // products that are summed in 32 bits: more would leave fewer bits to the weights
constexpr int kMostNumber = (1 << 13) - 1;
constexpr int kMostSum = INT_MAX / kMostNumber;  // of the weights of a stretch, whatever their signs

// How many numbers are multiplied, of so many: rows and weights end with a zero where they are odd.
constexpr int word_depth(int numbers) { return ceil_div(numbers, kTwo) * kTwo; }

using WordRows = ScaledRows<int16_t>;

// A panel of weights as `pack_words` writes it: what a number of each column stands for, the columns' sums, and
// (depth / 2, kPanel, 2) words. The floats that it takes, for so many numbers:
constexpr size_t word_panel(int numbers) {
    return 2 * kPanel + static_cast<size_t>(word_depth(numbers)) * kPanel / (sizeof(float) / sizeof(int16_t));
}

// weight (out, in, taps) → packed (out / panel, word_panel), in the order (taps, word_depth(in)) of the rows' numbers.
void pack_words(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel);

// As `rows_to_bytes`, in memory of this many floats.
WordRows rows_to_words(Rows rows, int count, int numbers, float* memory);

size_t word_rows_floats(int count, int numbers);

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

// A vector's numbers in 16 bits: round(x · inverse + zero), from -kMostNumber to kMostNumber.
PC_INLINE void store_whole(int16_t* to, Vector x, float inverse, float zero) {
    const Vector most = Vector{} + static_cast<float>(kMostNumber);
    const Vector y = larger(x * inverse + zero, -most);
    store_words(to, rounded(y < most ? y : most));
}

}  // namespace posecrafter

#endif
