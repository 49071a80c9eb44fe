// Numbers and weights in 16 bits. Layer 4.
#include "words.h"

#ifdef PC_HAS_VNNI

#include <algorithm>
#include <cmath>

namespace posecrafter {

namespace {

// Returns the largest sum of magnitudes over a stretch of weights, wherever it begins.
double most_sum(const float* row, int in_channels, int taps) {
    double last[kStretch] = {}, sum = 0, most = 0;
    size_t at = 0;
    for (int tap = 0; tap < taps; ++tap)
        for (int i = 0; i < in_channels; ++i, at = (at + 1) % kStretch) {
            const double weight = std::abs(double{row[i * taps + tap]});
            sum += weight - last[at];
            last[at] = weight;
            most = std::max(most, sum);
        }
    return most;
}

// Returns a scale with which no sum of a stretch leaves 32 bits. Rounding changes each weight by at most half a step.
WeightScale word_scale(const float* row, int in_channels, int taps) {
    constexpr double kFitting = kMostSum - kStretch / 2 - 1;
    const WeightScale widest = weight_scale(row, in_channels * taps, INT16_MAX);
    const double most = most_sum(row, in_channels, taps);
    if (!(widest.inverse * most > kFitting)) return widest;
    return {static_cast<float>(most / kFitting), static_cast<float>(kFitting / most)};
}

// Words from one row to the next, chosen to keep rows in different sets of the innermost cache.
size_t word_stride(int numbers) { return byte_stride(numbers * sizeof(int16_t)) / sizeof(int16_t); }

}  // namespace

void pack_words(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel) {
    const int depth = word_depth(in_channels);
    pack_whole<int16_t>(
        {weight, in_channels, taps, out_channels, word_panel(depth * taps), depth}, packed, parallel,
        [=](const float* weights, int) { return word_scale(weights, in_channels, taps); },
        [](int16_t* words, int column, int k, int whole) {
            words[(k / kTwo * kPanel + column) * kTwo + k % kTwo] = static_cast<int16_t>(whole);
        });
}

size_t word_rows_floats(int count, int numbers) {
    return count * (2 + word_stride(numbers) / (sizeof(float) / sizeof(int16_t)));
}

WordRows rows_to_words(Rows rows, int count, int numbers, float* memory) {
    const size_t stride = word_stride(numbers);
    float *scales = memory, *lows = scales + count;
    auto* words = reinterpret_cast<int16_t*>(lows + count);
    scale_rows(rows, count, numbers, 2 * kMostNumber, scales, lows,
               [=](int r, const float* row, float inverse, float zero) {
                   for (int i = 0; i < numbers; i += kLanes)  // there is room beyond the row
                       store_whole(words + r * stride + i, read(row, i, numbers), inverse, zero - kMostNumber);
                   lows[r] += scales[r] * kMostNumber;
               });
    return {words, stride, word_depth(numbers), 1, 0, scales, lows, 1};
}

}  // namespace posecrafter

#endif
