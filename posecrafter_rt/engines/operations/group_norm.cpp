// GroupNorm as a scale and a shift for each channel of each frame. Reads the input once for the mean and once for the
// variance. Layer 4.
#include "group_norm.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace posecrafter {

namespace {

// The sum of (x - centre), or of its square: in float over a stretch, in double over stretches.
template <bool kIsSquared>
double sum(const float* x, size_t count, float centre) {
    constexpr size_t kStretch = 4096;
    double total = 0;
    for (size_t begin = 0; begin < count; begin += kStretch) {
        const size_t end = std::min(count, begin + kStretch);
        Vector sums[4] = {};
        size_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) {
                const Vector v = load(x + i + part * kLanes) - centre;
                sums[part] += kIsSquared ? v * v : v;
            }
        alignas(Vector) float lanes[kLanes];
        store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (float lane : lanes) total += lane;
        for (; i < end; ++i) total += kIsSquared ? (x[i] - centre) * (x[i] - centre) : x[i] - centre;
    }
    return total;
}

}  // namespace

void group_norm_scales(const GroupNorm& norm, const Parallel& parallel) {
    if (norm.groups == 0) {
        for (size_t frame = 0, channels = norm.channels; frame < static_cast<size_t>(norm.frames); ++frame) {
            std::copy_n(norm.weight, channels, norm.scale + frame * channels);
            std::copy_n(norm.bias, channels, norm.shift + frame * channels);
        }
        return;
    }
    const int width = norm.channels / norm.groups;  // channels of a group
    const size_t count = width * norm.size;
    parallel(norm.frames * norm.groups, [&](int index) {
        const float* x = norm.input + index * count;
        const float mean = static_cast<float>(sum<false>(x, count, 0) / count);
        const double deviation = std::sqrt(sum<true>(x, count, mean) / count + norm.eps);
        for (int c = 0; c < width; ++c) {
            const int channel = index % norm.groups * width + c;
            const float scale = static_cast<float>(norm.weight[channel] / deviation);
            norm.scale[index * width + c] = scale;
            norm.shift[index * width + c] = norm.bias[channel] - mean * scale;
        }
    });
}

}  // namespace posecrafter
