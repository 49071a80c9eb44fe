// Numbers and weights in two digits of eight bits. Layer 4.
#include "digits.h"

#ifdef PC_HAS_TILES

#include <algorithm>
#include <cmath>

namespace posecrafter {

void pack_digits(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                 const Parallel& parallel) {
    const int depth = byte_depth(in_channels);
    pack_whole<int8_t>(
        {weight, in_channels, taps, out_channels, digit_panel(depth * taps), depth}, packed, parallel,
        [](const float* weights, int count) { return weight_scale(weights, count, kMostWeightDigits); },
        [all = size_t(depth) * taps](int8_t* digits, int column, int k, int whole) {
            int8_t* to = digits + column / kLanes * all * kPanel + column % kLanes * kFour;
            to += k / kWhole * kWhole * kPanel + k % kWhole / kFour * kLanes * kFour + k % kFour;
            to[0] = static_cast<int8_t>((whole + kDigit / 2) >> 8);
            to[kWhole * kLanes] = static_cast<int8_t>(whole & (kDigit - 1));
        });
}

size_t digit_rows_floats(int count, int numbers) { return count * (2 + 2 * byte_stride(numbers) / sizeof(float)); }

DigitRows rows_to_digits(Rows rows, int count, int numbers, float* memory) {
    const int depth = byte_depth(numbers);
    const size_t stride = 2 * byte_stride(numbers), lower = byte_stride(numbers);
    float *scales = memory, *lows = scales + count;
    auto* digits = reinterpret_cast<uint8_t*>(lows + count);
    scale_rows(rows, count, numbers, kMostDigits, scales, lows,
               [=](int r, const float* row, float inverse, float zero) {
                   uint8_t* to = digits + r * stride;
                   for (int i = 0; i < numbers; i += kLanes)  // there is room beyond the row
                       store_digits(to + i, lower, read(row, i, numbers), inverse, zero);
                   std::fill(to + numbers, to + depth, uint8_t{0});
                   std::fill(to + lower + numbers, to + lower + depth, uint8_t{0});
               });
    return {{digits, stride, depth, 1, 0, scales, lows, 1}, lower};
}

}  // namespace posecrafter

#endif
