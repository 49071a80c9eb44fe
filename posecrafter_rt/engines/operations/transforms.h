// Winograd's transforms of F(2, 3), at the points 0, ±1 and infinity, and of F(4, 3), at 0, ±1, ±2 and infinity: G of
// weights, Bᵀ of inputs, Aᵀ of products. Lavin and Gray (2015), section 4. Layer 4.
#pragma once

#include "simd.h"

namespace posecrafter {

// G, (tile + 2) × 3, row by row.
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

// One column of Bᵀ d of F(2, 3).
PC_INLINE void transform_in(const Vector (&d)[4], Vector (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
}

// One column of Bᵀ d of F(4, 3).
PC_INLINE void transform_in(const Vector (&d)[6], Vector (&t)[6]) {
    const Vector even = d[4] - 4 * d[2], odd = d[3] - 4 * d[1];
    const Vector far = d[4] - d[2], wide = 2 * (d[3] - d[1]);
    t[0] = 4 * d[0] + (d[4] - 5 * d[2]);
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = far + wide;
    t[4] = far - wide;
    t[5] = 4 * d[1] + (d[5] - 5 * d[3]);
}

// One column of Aᵀ m of F(2, 3).
PC_INLINE void transform_out(const Vector (&m)[4], Vector (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) - m[3];
}

// One column of Aᵀ m of F(4, 3).
PC_INLINE void transform_out(const Vector (&m)[6], Vector (&y)[4]) {
    const Vector sum1 = m[1] + m[2], difference1 = m[1] - m[2];
    const Vector sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = m[0] + (sum1 + sum2);
    y[1] = 2 * difference2 + difference1;
    y[2] = 4 * sum2 + sum1;
    y[3] = 8 * difference2 + difference1 + m[5];
}

}  // namespace posecrafter
