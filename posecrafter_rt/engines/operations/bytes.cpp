// Numbers and weights in eight bits. Layer 4.
#include "bytes.h"

#include <algorithm>
#include <cmath>

namespace posecrafter {

WeightScale weight_scale(const float* weights, int count, int most) {
    float largest = 0, none = 0;  // none: NaN if one is not finite, which comparisons miss
    for (int i = 0; i < count; ++i) largest = std::max(largest, std::abs(weights[i])), none += weights[i] * 0;
    const auto whole = static_cast<float>(most);
    return {largest / whole + none, largest > 0 && none == 0 ? whole / largest : 0};
}

void pack_bytes(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                const Parallel& parallel) {
    const int depth = byte_depth(in_channels);
    pack_whole<int8_t>(
        {weight, in_channels, taps, out_channels, byte_panel(depth * taps), depth}, packed, parallel,
        [](const float* weights, int count) { return weight_scale(weights, count, 127); },
        [](int8_t* bytes, int column, int k, int whole) {
            bytes[(k / kFour * kPanel + column) * kFour + k % kFour] = static_cast<int8_t>(whole);
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
            nothing += v * 0.0f;  // NaN if one is not finite, which comparisons miss
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
    scale_rows(rows, count, numbers, 255, scales, lows, [=](int r, const float* row, float inverse, float zero) {
        uint8_t* to = bytes + r * stride;
        int i = 0;
        for (; i + kLanes <= numbers; i += kLanes) store_whole(to + i, load(row + i), inverse, zero);
        for (; i < numbers; ++i) {
            const float byte = row[i] * inverse + (zero + 0.5f);
            to[i] = static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, byte)));
        }
        std::fill(to + i, to + depth, uint8_t{0});
    });
    return {bytes, stride, depth, 1, 0, scales, lows, 1};
}

}  // namespace posecrafter
