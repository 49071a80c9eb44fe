// Numbers and weights in two digits of eight bits. Layer 4.
#include "digits.h"

#ifdef PC_HAS_TILES

#include <algorithm>
#include <cmath>

namespace posecrafter {

void pack_digits(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                 const Parallel& parallel) {
    const int numbers = in_channels * taps, stretch = byte_depth(in_channels), depth = stretch * taps;
    parallel(out_channels / kPanel, [=](int panel) {
        float* scales = packed + panel * digit_panel(depth);
        auto* digits = reinterpret_cast<int8_t*>(scales + 2 * kPanel);
        if (depth > numbers) std::fill_n(digits, size_t{2} * depth * kPanel, int8_t{0});
        for (int o = 0; o < kPanel; ++o) {
            const float* row = weight + (static_cast<size_t>(panel) * kPanel + o) * numbers;
            const WeightScale scale = weight_scale(row, numbers, kMostWeightDigits);
            int8_t* column = digits + o / kLanes * depth * kPanel + o % kLanes * kFour;
            int64_t sum = 0;
            for (int tap = 0; tap < taps; ++tap)
                for (int i = 0; i < in_channels; ++i) {
                    const int k = tap * stretch + i;
                    const int whole = scale.whole(row[i * taps + tap]);
                    int8_t* to =
                        column + k / kWhole * kWhole * kPanel + k % kWhole / kFour * kLanes * kFour + k % kFour;
                    to[0] = static_cast<int8_t>((whole + kDigit / 2) >> 8);
                    to[kWhole * kLanes] = static_cast<int8_t>(whole & (kDigit - 1));
                    sum += whole;
                }
            scales[o] = scale.step;
            scales[kPanel + o] = static_cast<float>(sum) * scale.step;
        }
    });
}

size_t digit_rows_floats(int count, int numbers) { return count * (2 + 2 * byte_stride(numbers) / sizeof(float)); }

DigitRows rows_to_digits(Rows rows, int count, int numbers, float* memory) {
    const int depth = byte_depth(numbers);
    const size_t stride = 2 * byte_stride(numbers), lower = byte_stride(numbers);
    float *scales = memory, *lows = scales + count;
    auto* digits = reinterpret_cast<uint8_t*>(lows + count);
    const DigitRows made{{digits, stride, depth, 1, 0, scales, lows, 1}, lower};
    for (int r = 0; r < count; ++r, digits += stride) {
        const float* row = rows.first + r * rows.stride;
        const Range range = range_of(row, numbers);
        const float scale = (range.high - range.low) / kMostDigits;
        lows[r] = range.low, scales[r] = scale;
        const float inverse = scale > 0 ? 1 / scale : 0, zero = -range.low * inverse;
        for (int i = 0; i < numbers; i += kLanes)  // beyond the row there is room
            store_digits(digits + i, lower, read(row, i, numbers), inverse, zero);
        std::fill(digits + numbers, digits + depth, uint8_t{0});
        std::fill(digits + lower + numbers, digits + lower + depth, uint8_t{0});
    }
    return made;
}

}  // namespace posecrafter

#endif
