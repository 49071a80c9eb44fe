// Numbers and weights in eight bits: rows of numbers from 0 to 255 and panels of weights from -127 to 127, whose
// products are summed exactly in 32 bits. Layer 4.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

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

constexpr int kFour = 4;  // numbers of a row that a lane takes at once
#ifdef __AMX_INT8__
#define PC_HAS_TILES
constexpr int kWhole = 64;  // that a tile takes: rows and weights end with zeros where they have fewer
#else
constexpr int kWhole = kFour;
#endif

// How many numbers are multiplied, of so many.
constexpr int byte_depth(int numbers) { return ceil_div(numbers, kWhole) * kWhole; }

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
// (depth / 4, kPanel, 4) bytes. The floats that it takes, for so many numbers:
constexpr size_t byte_panel(int numbers) {
    return 2 * kPanel + static_cast<size_t>(byte_depth(numbers)) * kPanel / sizeof(float);
}

// How a channel's weights are rounded: a weight is `step` times a whole number. NaN where one is not finite.
struct WeightScale {
    float step, inverse;

    int whole(float weight) const { return inverse > 0 ? static_cast<int>(std::lrint(weight * inverse)) : 0; }
};

// So that the largest is this whole number.
WeightScale weight_scale(const float* weights, int count, int most);

// weight (out, in, taps) → packed (out / panel, byte_panel), in the order (taps, byte_depth(in)) of the rows' numbers.
void pack_bytes(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel);

// The least and the most of some numbers, or NaN where one is not finite.
struct Range {
    float low, high;
};

Range range_of(const float* x, int count);

// `count` rows of so many floats as bytes, each of one segment and with a scale of its own, in memory of this many
// floats.
ByteRows rows_to_bytes(Rows rows, int count, int numbers, float* memory);

size_t byte_rows_floats(int count, int numbers);

// Bytes from one row to the next: apart in the sets of the innermost cache.
constexpr size_t byte_stride(int numbers) {
    constexpr int kLine = 64;
    return ceil_div(numbers, kLine) * kLine + kLine;
}

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

// What sums of a row's products with half a panel stand for: the panel's scales and sums there, the row's scale and
// low.
PC_INLINE Vector scaled(Vector sums, Vector scale, Vector sum, float row_scale, float row_low) {
    return sums * scale * row_scale + sum * row_low;
}

}  // namespace posecrafter
