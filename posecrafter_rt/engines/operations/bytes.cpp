// Numbers and weights in eight bits. Layer 4.
#include "bytes.h"

#include <algorithm>
#include <cmath>

namespace posecrafter {

WeightScale weight_scale(const float* weights, int count, int most) {
    float largest = 0, none = 0;  // NaN where one is not finite: comparisons pass over it
    for (int i = 0; i < count; ++i) largest = std::max(largest, std::abs(weights[i])), none += weights[i] * 0;
    const auto whole = static_cast<float>(most);
    return {largest / whole + none, largest > 0 && none == 0 ? whole / largest : 0};
}

void pack_bytes(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel) {
    const int numbers = in_channels * taps, stretch = byte_depth(in_channels), depth = stretch * taps;
    parallel(out_channels / kPanel, [=](int panel) {
        float* scales = packed + panel * byte_panel(depth);
        auto* bytes = reinterpret_cast<int8_t*>(scales + 2 * kPanel);
        if (depth > numbers) std::fill_n(bytes, static_cast<size_t>(depth) * kPanel, int8_t{0});
        for (int o = 0; o < kPanel; ++o) {
            const float* row = weight + (static_cast<size_t>(panel) * kPanel + o) * numbers;
            const WeightScale scale = weight_scale(row, numbers, 127);
            int64_t sum = 0;
            for (int tap = 0; tap < taps; ++tap)
                for (int i = 0; i < in_channels; ++i) {
                    const int k = tap * stretch + i, byte = scale.whole(row[i * taps + tap]);
                    bytes[(k / kFour * kPanel + o) * kFour + k % kFour] = static_cast<int8_t>(byte);
                    sum += byte;
                }
            scales[o] = scale.step;
            scales[kPanel + o] = static_cast<float>(sum) * scale.step;
        }
    });
}

Range range_of(const float* x, int count) {
    Vector low[2] = {}, high[2] = {}, nothing{};
    for (auto& v : low) v += x[0];
    for (auto& v : high) v += x[0];
    int i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes)
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
            const Vector v = load(x + i + part * kLanes);
            low[part] = v < low[part] ? v : low[part];
            high[part] = v > high[part] ? v : high[part];
            nothing += v * 0.0f;  // NaN where one is not finite: comparisons pass over it
        }
    Range range{std::min(x[0], least(low[1] < low[0] ? low[1] : low[0])),
                std::max(x[0], most(high[1] > high[0] ? high[1] : high[0]))};
    float none = total(nothing);
    for (; i < count; ++i) {
        range.low = std::min(range.low, x[i]);
        range.high = std::max(range.high, x[i]);
        none += x[i] * 0.0f;
    }
    return {range.low + none, range.high + none};
}

size_t byte_rows_floats(int count, int numbers) { return count * (2 + byte_stride(numbers) / sizeof(float)); }

ByteRows rows_to_bytes(Rows rows, int count, int numbers, float* memory) {
    const int depth = byte_depth(numbers);
    const size_t stride = byte_stride(numbers);
    float *scales = memory, *lows = scales + count;
    auto* bytes = reinterpret_cast<uint8_t*>(lows + count);
    const ByteRows made{bytes, stride, depth, 1, 0, scales, lows, 1};
    for (int r = 0; r < count; ++r, bytes += stride) {
        const float* row = rows.first + r * rows.stride;
        const Range range = range_of(row, numbers);
        const float scale = (range.high - range.low) / 255;
        lows[r] = range.low, scales[r] = scale;
        const float inverse = scale > 0 ? 1 / scale : 0, zero = -range.low * inverse;
        int i = 0;
        for (; i + kLanes <= numbers; i += kLanes) store_bytes(bytes + i, load(row + i), inverse, zero);
        for (; i < numbers; ++i) {
            const float byte = row[i] * inverse + (zero + 0.5f);
            bytes[i] = static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, byte)));
        }
        std::fill(bytes + i, bytes + depth, uint8_t{0});
    }
    return made;
}

}  // namespace posecrafter
