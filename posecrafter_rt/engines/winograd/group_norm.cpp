// GroupNorm as a scale and a shift for each channel of each frame: one reading of the input for the mean, one for the
// variance. Layer 4.
#include <algorithm>
#include <cmath>

#include "simd.h"
#include "winograd.h"

namespace posecrafter {

#ifdef PC_WINOGRAD
namespace {

// The sum of (x - centre), or of its square: in float over a stretch, in double over stretches.
template <bool kIsSquared>
PC_AVX2 double sum(const float* x, size_t count, float centre) {
    constexpr size_t kStretch = 4096;
    double total = 0;
    for (size_t begin = 0; begin < count; begin += kStretch) {
        const size_t end = std::min(count, begin + kStretch);
        __m256 sums[4];
        for (__m256& lanes : sums) lanes = _mm256_setzero_ps();
        size_t i = begin;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part) {
                const __m256 v = _mm256_sub_ps(_mm256_loadu_ps(x + i + part * kLanes), _mm256_set1_ps(centre));
                sums[part] = kIsSquared ? _mm256_fmadd_ps(v, v, sums[part]) : _mm256_add_ps(v, sums[part]);
            }
        alignas(32) float lanes[kLanes];
        _mm256_store_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
        for (float lane : lanes) total += lane;
        for (; i < end; ++i) total += kIsSquared ? (x[i] - centre) * (x[i] - centre) : x[i] - centre;
    }
    return total;
}

}  // namespace

void group_norm_scales(const GroupNorm& norm, const Parallel& parallel) {
    const int width = norm.channels / norm.groups;  // of a group, in channels
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

#else

void group_norm_scales(const GroupNorm&, const Parallel&) {}

#endif

}  // namespace posecrafter
