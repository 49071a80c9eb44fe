// Winograd's transforms of F(2, 3), at the points 0, ±1 and infinity, and of F(4, 3), at 0, ±1, ±2 and infinity.
// Layer 4. Of weights G, of inputs Bᵀ, of products Aᵀ: Lavin and Gray (2015), section 4.
#pragma once

#include "simd.h"

namespace posecrafter {

// (tile + 2) × 3, row by row.
inline const double (*weight_transform(int tile))[3] {
    static const double two[4][3] = {{1, 0, 0}, {1. / 2, 1. / 2, 1. / 2}, {1. / 2, -1. / 2, 1. / 2}, {0, 0, 1}};
    static const double four[6][3] = {{1. / 4, 0, 0},
                                      {-1. / 6, -1. / 6, -1. / 6},
                                      {-1. / 6, 1. / 6, -1. / 6},
                                      {1. / 24, 1. / 12, 1. / 6},
                                      {1. / 24, -1. / 12, 1. / 6},
                                      {0, 0, 1}};
    return tile == 2 ? two : four;
}

#ifdef PC_WINOGRAD

// One column of Bᵀ d of F(2, 3).
PC_INLINE void transform_in(const __m256 (&d)[4], __m256 (&t)[4]) {
    t[0] = _mm256_sub_ps(d[0], d[2]);
    t[1] = _mm256_add_ps(d[1], d[2]);
    t[2] = _mm256_sub_ps(d[2], d[1]);
    t[3] = _mm256_sub_ps(d[1], d[3]);
}

// One column of Bᵀ d of F(4, 3).
PC_INLINE void transform_in(const __m256 (&d)[6], __m256 (&t)[6]) {
    const __m256 two = _mm256_set1_ps(2), four = _mm256_set1_ps(4), five = _mm256_set1_ps(5);
    const __m256 even = _mm256_fnmadd_ps(four, d[2], d[4]), odd = _mm256_fnmadd_ps(four, d[1], d[3]);
    const __m256 far = _mm256_sub_ps(d[4], d[2]), wide = _mm256_mul_ps(two, _mm256_sub_ps(d[3], d[1]));
    t[0] = _mm256_fmadd_ps(four, d[0], _mm256_fnmadd_ps(five, d[2], d[4]));
    t[1] = _mm256_add_ps(even, odd);
    t[2] = _mm256_sub_ps(even, odd);
    t[3] = _mm256_add_ps(far, wide);
    t[4] = _mm256_sub_ps(far, wide);
    t[5] = _mm256_fmadd_ps(four, d[1], _mm256_fnmadd_ps(five, d[3], d[5]));
}

// One column of Aᵀ m of F(2, 3).
PC_INLINE void transform_out(const __m256 (&m)[4], __m256 (&y)[2]) {
    y[0] = _mm256_add_ps(m[0], _mm256_add_ps(m[1], m[2]));
    y[1] = _mm256_sub_ps(_mm256_sub_ps(m[1], m[2]), m[3]);
}

// One column of Aᵀ m of F(4, 3).
PC_INLINE void transform_out(const __m256 (&m)[6], __m256 (&y)[4]) {
    const __m256 two = _mm256_set1_ps(2), four = _mm256_set1_ps(4), eight = _mm256_set1_ps(8);
    const __m256 sum1 = _mm256_add_ps(m[1], m[2]), difference1 = _mm256_sub_ps(m[1], m[2]);
    const __m256 sum2 = _mm256_add_ps(m[3], m[4]), difference2 = _mm256_sub_ps(m[3], m[4]);
    y[0] = _mm256_add_ps(m[0], _mm256_add_ps(sum1, sum2));
    y[1] = _mm256_fmadd_ps(two, difference2, difference1);
    y[2] = _mm256_fmadd_ps(four, sum2, sum1);
    y[3] = _mm256_add_ps(_mm256_fmadd_ps(eight, difference2, difference1), m[5]);
}

#endif

}  // namespace posecrafter
