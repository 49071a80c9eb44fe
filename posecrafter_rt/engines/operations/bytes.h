// Numbers and weights in eight bits: rows of numbers from 0 to 255 and panels of weights from -127 to 127. Sums of
// their products are exact in 32 bits. Layer 4.
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

template <class Number>
constexpr int kGroup = sizeof(uint32_t) / sizeof(Number);  // numbers of a row that a lane takes at once
constexpr int kFour = kGroup<uint8_t>;
#ifdef __AMX_INT8__
#define PC_HAS_TILES
constexpr int kWhole = 64;  // numbers that a tile takes; shorter rows and weights are padded with zeros
#else
constexpr int kWhole = kFour;
#endif

// The count of numbers that are multiplied, padding included.
constexpr int byte_depth(int numbers) { return ceil_div(numbers, kWhole) * kWhole; }

// Rows of integers. Each has `segments` stretches of `depth` numbers, `pitch` apart. A number stands for low + scale ·
// number. Row r's scale and low are `step · r` after the first row's.
template <class Number>
struct ScaledRows {
    const Number* first;
    size_t stride;
    int depth, segments;
    size_t pitch;
    const float *scale, *low;
    int step;

    ScaledRows from(int row) const {
        ScaledRows rows = *this;
        rows.first += row * stride, rows.scale += row * step, rows.low += row * step;
        return rows;
    }
};

using ByteRows = ScaledRows<uint8_t>;

// A panel of weights as `pack_bytes` writes it: each column's scale, each column's sum of what its bytes stand for,
// then (depth / 4, kPanel, 4) bytes. Returns its size in floats for `numbers` numbers.
constexpr size_t byte_panel(int numbers) {
    return 2 * kPanel + static_cast<size_t>(byte_depth(numbers)) * kPanel / sizeof(float);
}

// How a channel's weights are rounded: a weight is `step` times an integer. step is NaN if a weight is not finite.
struct WeightScale {
    float step, inverse;

    int whole(float weight) const { return inverse > 0 ? static_cast<int>(std::lrint(weight * inverse)) : 0; }
};

// Returns the scale in which the largest magnitude is `most`.
WeightScale weight_scale(const float* weights, int count, int most);

// Packs weight (out, in, taps) as (out / panel, byte_panel), in the order of the rows' numbers: (taps, byte_depth(in)).
void pack_bytes(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel);

// A layer's weights (out, in, taps), and how they are packed. Each panel takes `floats` floats: its columns' scales and
// sums, then integers, `depth` for each tap.
struct Packing {
    const float* weight;
    int in_channels, taps, out_channels;
    size_t floats;
    int depth;
};

// Rounds each column's weights by scale_of(weights, count), and calls put(the panel's integers, column, k, whole) for
// each.
template <class Number, class ScaleOf, class Put>
void pack_whole(const Packing& packing, float* packed, const Parallel& parallel, const ScaleOf& scale_of,
                const Put& put) {
    parallel(packing.out_channels / kPanel, [&](int panel) {
        const int in = packing.in_channels, taps = packing.taps, numbers = in * taps;
        float* scales = packed + panel * packing.floats;
        auto* whole_numbers = reinterpret_cast<Number*>(scales + 2 * kPanel);
        if (packing.depth > in) std::memset(whole_numbers, 0, (packing.floats - 2 * kPanel) * sizeof(float));
        for (int o = 0; o < kPanel; ++o) {
            const float* row = packing.weight + (static_cast<size_t>(panel) * kPanel + o) * numbers;
            const WeightScale scale = scale_of(row, numbers);
            int64_t sum = 0;
            for (int tap = 0; tap < taps; ++tap)
                for (int i = 0; i < in; ++i) {
                    const int whole = scale.whole(row[i * taps + tap]);
                    put(whole_numbers, o, tap * packing.depth + i, whole);
                    sum += whole;
                }
            scales[o] = scale.step;
            scales[kPanel + o] = static_cast<float>(sum) * scale.step;
        }
    });
}

// The least and the largest of some numbers, both NaN if one is not finite.
struct Range {
    float low, high;
};

Range range_of(const float* x, int count);

// Calls convert(r, row, inverse, zero) for each row of `numbers` floats. A number · inverse + zero is from 0 to `most`:
// 0 stands for lows[r], and each step adds scales[r]. Both of these are NaN if a number is not finite.
template <class Convert>
void scale_rows(Rows rows, int count, int numbers, int most, float* scales, float* lows, const Convert& convert) {
    for (int r = 0; r < count; ++r) {
        const float* row = rows.first + r * rows.stride;
        const Range range = range_of(row, numbers);
        scales[r] = (range.high - range.low) / static_cast<float>(most), lows[r] = range.low;
        const float inverse = scales[r] > 0 ? 1 / scales[r] : 0;
        convert(r, row, inverse, -range.low * inverse);
    }
}

// Converts `count` rows of `numbers` floats to bytes, in `memory` of byte_rows_floats floats. Each row has one segment
// and its own scale.
ByteRows rows_to_bytes(Rows rows, int count, int numbers, float* memory);

size_t byte_rows_floats(int count, int numbers);

// Bytes from one row to the next. One line more than needed keeps rows in different sets of the innermost cache.
constexpr size_t byte_stride(int numbers) {
    constexpr int kLine = 64;
    return ceil_div(numbers, kLine) * kLine + kLine;
}

using Integers = int __attribute__((vector_size(kLanes * sizeof(int))));

// Stores a vector's numbers as bytes: round(x · inverse + zero), limited to 0 … 255.
PC_INLINE void store_whole(uint8_t* to, Vector x, float inverse, float zero) {
    using Bytes = uint8_t __attribute__((vector_size(kLanes)));
    const Vector nothing{}, most = nothing + 255.0f;
    Vector y = x * inverse + (zero + 0.5f);
    y = y > nothing ? y : nothing;
    y = y < most ? y : most;
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(y, Integers), Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
}

// Returns what sums of a row's products with half a panel stand for. scale, sum: that half's scales and sums.
PC_INLINE Vector scaled(Vector sums, Vector scale, Vector sum, float row_scale, float row_low) {
    return sums * scale * row_scale + sum * row_low;
}

}  // namespace posecrafter
