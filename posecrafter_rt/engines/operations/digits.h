// Numbers and weights in 16 bits as two digits of eight: 256 · high + low, the low one from -128 to 127. Of a product
// that of the low digits is left out, 2⁻¹⁶ of it; other sums are exact in 32 bits, of 43,000 numbers at least. Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bytes.h"

#ifdef PC_HAS_TILES

namespace posecrafter {

constexpr int kDigit = 256, kMostDigits = 255 * kDigit + 127;  // of a number, whose high digit has no sign
constexpr int kMostWeightDigits = 127 * kDigit + 127;

// Rows of high digits, as of bytes, each low one `lower` bytes after its high one.
struct DigitRows {
    ByteRows high;
    size_t lower;

    DigitRows from(int row) const { return {high.from(row), lower}; }
};

// A panel of weights as `pack_digits` writes it: as of bytes, but for each half of the columns and each kWhole numbers
// all high digits, then all low ones. The floats that it takes:
constexpr size_t digit_panel(int numbers) {
    return 2 * kPanel + static_cast<size_t>(byte_depth(numbers)) * 2 * kPanel / sizeof(float);
}

// weight (out, in, taps) → packed (out / panel, digit_panel), in the order (taps, byte_depth(in)) of the rows' numbers.
void pack_digits(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                 const Parallel& parallel);

// As `rows_to_bytes`, in memory of this many floats.
DigitRows rows_to_digits(Rows rows, int count, int numbers, float* memory);

size_t digit_rows_floats(int count, int numbers);

// A vector's numbers in digits: round(x · inverse + zero), from 0 to kMostDigits.
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
