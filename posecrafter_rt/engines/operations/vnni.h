// Products in eight bits by the processor's VNNI, four of each lane at once. Layer 4.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "bytes.h"

#ifdef PC_HAS_VNNI

namespace posecrafter {

// Adds to each lane the products of four numbers and its four weights.
PC_INLINE Integers dot(Integers sums, uint32_t four, const int8_t* weights) {
#ifdef __AVX512F__
    const __m512i left = _mm512_set1_epi32(static_cast<int>(four)), right = _mm512_loadu_si512(weights);
    return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), left, right));
#else
    const __m256i left = _mm256_set1_epi32(static_cast<int>(four));
    const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    return reinterpret_cast<Integers>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), left, right));
#endif
}

// kCount rows times a panel → out, rows of kPanel floats.
template <int kCount>
void multiply_bytes(const ByteRows& rows, const float* panel, Sums out, const Fetch& next) {
    constexpr int kStep = kFour * kLanes;
    const auto* weights = reinterpret_cast<const int8_t*>(panel + 2 * kPanel);
    Integers sums[kCount][2] = {};
    for (int segment = 0; segment < rows.segments; ++segment) {
        const uint8_t* first = rows.first + segment * rows.pitch;
        for (int k = 0; k < rows.depth; k += kFour, weights += 2 * kStep) {
            next.fetch((segment * rows.depth + k) / kFour);
#pragma GCC unroll 14
            for (int r = 0; r < kCount; ++r) {
                uint32_t four;
                std::memcpy(&four, first + r * rows.stride + k, sizeof four);
                sums[r][0] = dot(sums[r][0], four, weights);
                sums[r][1] = dot(sums[r][1], four, weights + kStep);
            }
        }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        const Vector scale = load(panel + half * kLanes), sum = load(panel + kPanel + half * kLanes);
#pragma GCC unroll 14
        for (int r = 0; r < kCount; ++r) {
            const Vector own = __builtin_convertvector(sums[r][half], Vector);
            store(out.first + r * out.stride + half * kLanes,
                  scaled(own, scale, sum, rows.scale[r * rows.step], rows.low[r * rows.step]));
        }
    }
}

using MultiplyBytes = void (*)(const ByteRows&, const float*, Sums, const Fetch&);

template <int... kCounts>
constexpr std::array<MultiplyBytes, kRows> byte_multiplies(std::integer_sequence<int, kCounts...>) {
    return {multiply_bytes<kCounts + 1>...};
}

constexpr auto kMultiplyBytes = byte_multiplies(std::make_integer_sequence<int, kRows>());

}  // namespace posecrafter

#endif
