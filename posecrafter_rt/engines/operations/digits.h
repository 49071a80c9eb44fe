// Numbers and weights in 16 bits as two digits of eight bits: 256 · high + low, with low from -128 to 127. The product
// of both low digits, 2⁻¹⁶ of the whole, is left out. Other sums are exact in 32 bits for at least 43,000 numbers.
// Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bytes.h"

#ifdef PC_HAS_TILES

namespace posecrafter {

constexpr int kDigit = 256, kMostDigits = 255 * kDigit + 127;  // the largest number; its high digit is unsigned
constexpr int kMostWeightDigits = 127 * kDigit + 127;

// Rows of high digits, like rows of bytes; each low digit is `lower` bytes after its high digit.
struct DigitRows {
    ByteRows high;
    size_t lower;

    DigitRows from(int row) const { return {high.from(row), lower}; }
};

// A panel of weights as `pack_digits` writes it. It is like a panel of bytes, but for each half of the columns and each
// kWhole numbers it has all high digits, then all low ones. Returns its size in floats.
constexpr size_t digit_panel(int numbers) {
    return 2 * kPanel + static_cast<size_t>(byte_depth(numbers)) * 2 * kPanel / sizeof(float);
}

// Packs weight (out, in, taps) as (out / panel, digit_panel), in the order of the rows' numbers: (taps,
// byte_depth(in)).
void pack_digits(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                 const Parallel& parallel);

// Like `rows_to_bytes`, in `memory` of digit_rows_floats floats.
DigitRows rows_to_digits(Rows rows, int count, int numbers, float* memory);

size_t digit_rows_floats(int count, int numbers);

// Stores a vector's numbers as digits: round(x · inverse + zero), limited to 0 … kMostDigits.
PC_INLINE void store_digits(uint8_t* to, size_t lower, Vector x, float inverse, float zero) {
    using Bytes = uint8_t __attribute__((vector_size(kLanes)));
    const Vector nothing{}, most = nothing + static_cast<float>(kMostDigits);
    Vector y = x * inverse + (zero + 0.5f);
    y = y > nothing ? y : nothing;
    y = y < most ? y : most;
    const Integers whole = __builtin_convertvector(y, Integers);
    const Bytes high = __builtin_convertvector((whole + kDigit / 2) >> 8, Bytes);
    const Bytes low = __builtin_convertvector(whole & (kDigit - 1), Bytes);
    std::memcpy(to, &high, sizeof high);
    std::memcpy(to + lower, &low, sizeof low);
}

}  // namespace posecrafter

#endif
