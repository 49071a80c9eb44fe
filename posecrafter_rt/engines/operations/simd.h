// Vectors as wide as the instructions that this is compiled for, sixteen floats or eight, and what their operators
// lack: 16-bit halves, transposed columns of planes, and the functions SiLU and GELU. Layer 4.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__AVX512F__) && !(defined(__AVX2__) && defined(__FMA__) && defined(__F16C__))
#error \
    "there is neither AVX-512 nor AVX2, FMA and F16C: openvino_operations.py compiles this for what the processor has"
#endif

#include <immintrin.h>
#define PC_INLINE inline __attribute__((always_inline))

namespace posecrafter {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));
// Not `using`: with it, clang ignores the smaller alignment (llvm-project issue 68560).
typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

constexpr int kColumns = 8;  // the side of the squares that `transpose` transposes

PC_INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }

PC_INLINE void store(float* to, Vector v) { *reinterpret_cast<Unaligned*>(to) = v; }

// A 16-bit float, IEEE 754's binary16.
struct Half {
    uint16_t bits;
};

PC_INLINE Vector load(const Half* from) {
#ifdef __AVX512F__
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

// Rounds to nearest, ties to even. Numbers from 65520 on become infinite.
PC_INLINE void store(Half* to, Vector v) {
#ifdef __AVX512F__
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
}

// A mask of the first `count` of eight columns.
PC_INLINE __m256i columns_of(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Loads the first `count` floats of a vector; the others are zero.
PC_INLINE Vector load_some(const float* from, int count) {
#ifdef __AVX512F__
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), from);
#else
    return _mm256_maskload_ps(from, columns_of(count));
#endif
}

// Loads eight columns of kLanes planes as eight vectors; `store_columns` writes them back. With sixteen lanes, one
// vector has the columns of planes c and c + 8. Columns from `count` on are loaded as zeros, and are not written.
PC_INLINE void load_columns(const float* from, size_t plane, int count, Vector (&v)[kColumns]) {
    const __m256i some = columns_of(count);
    const auto eight = [=](const float* x) {
        return count == kColumns ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, some);
    };
    for (int c = 0; c < kColumns; ++c) {
#ifdef __AVX512F__
        const __m512d low = _mm512_castpd256_pd512(_mm256_castps_pd(eight(from + c * plane)));
        v[c] = _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_castps_pd(eight(from + (c + kColumns) * plane)), 1));
#else
        v[c] = eight(from + c * plane);
#endif
    }
}

PC_INLINE void store_columns(const Vector (&v)[kColumns], int count, float* to, size_t plane) {
    const __m256i some = columns_of(count);
    const auto eight = [=](float* x, __m256 y) {
        count == kColumns ? _mm256_storeu_ps(x, y) : _mm256_maskstore_ps(x, some, y);
    };
    for (int c = 0; c < kColumns; ++c) {
#ifdef __AVX512F__
        const __m512d both = _mm512_castps_pd(v[c]);
        eight(to + c * plane, _mm256_castpd_ps(_mm512_castpd512_pd256(both)));
        eight(to + (c + kColumns) * plane, _mm256_castpd_ps(_mm512_extractf64x4_pd(both, 1)));
#else
        eight(to + c * plane, v[c]);
#endif
    }
}

// Transposes the 8 × 8 square that eight vectors hold, or the two squares side by side.
PC_INLINE void transpose(Vector (&v)[kColumns]) {
    Vector a[kColumns], b[kColumns];
#ifdef __AVX512F__
#define PC_OF(name) _mm512_##name
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    const __m512i high = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    const auto lower = [=](Vector x, Vector y) { return _mm512_permutex2var_ps(x, low, y); };
    const auto upper = [=](Vector x, Vector y) { return _mm512_permutex2var_ps(x, high, y); };
#else
#define PC_OF(name) _mm256_##name
    const auto lower = [](Vector x, Vector y) { return _mm256_permute2f128_ps(x, y, 0x20); };
    const auto upper = [](Vector x, Vector y) { return _mm256_permute2f128_ps(x, y, 0x31); };
#endif
    for (int i = 0; i < kColumns; i += 2) {
        a[i] = PC_OF(unpacklo_ps)(v[i], v[i + 1]);
        a[i + 1] = PC_OF(unpackhi_ps)(v[i], v[i + 1]);
    }
    for (int i = 0; i < kColumns; i += 4)
        for (int j = 0; j < 2; ++j) {
            b[i + 2 * j] = PC_OF(shuffle_ps)(a[i + j], a[i + 2 + j], 0x44);
            b[i + 2 * j + 1] = PC_OF(shuffle_ps)(a[i + j], a[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; ++i) v[i] = lower(b[i], b[i + 4]), v[i + 4] = upper(b[i], b[i + 4]);
#undef PC_OF
}

// Reads up to eight columns of kLanes planes: one vector per column, one lane per plane.
PC_INLINE void read_columns(const float* from, size_t plane, int count, Vector (&v)[kColumns]) {
    load_columns(from, plane, count, v);
    transpose(v);
}

// The same if only the first `planes` of kLanes planes exist; the other lanes are zero.
inline void read_columns_of(int planes, const float* from, size_t plane, int count, Vector (&v)[kColumns]) {
    if (planes >= kLanes) return read_columns(from, plane, count, v);
    float all[kLanes * kColumns] = {};
    for (int c = 0; c < planes; ++c) std::copy_n(from + c * plane, count, all + c * kColumns);
    read_columns(all, kColumns, count, v);
}

// The opposite: writes vectors that are `stride` apart, plus a bias and the columns of a residual (nullptr: none), as
// columns.
PC_INLINE void write_columns(const float* from, size_t stride, Vector bias, int count, const float* residual, float* to,
                             size_t plane) {
    Vector v[kColumns] = {};
    for (int i = 0; i < count; ++i) v[i] = load(from + i * stride) + bias;
    transpose(v);
    if (residual != nullptr) {
        Vector before[kColumns];
        load_columns(residual, plane, count, before);
        for (int i = 0; i < kColumns; ++i) v[i] += before[i];
    }
    store_columns(v, count, to, plane);
}

// The same if only the first `planes` of kLanes planes exist.
inline void write_columns_of(int planes, const float* from, size_t stride, Vector bias, int count,
                             const float* residual, float* to, size_t plane) {
    if (planes >= kLanes) return write_columns(from, stride, bias, count, residual, to, plane);
    float all[kLanes * kColumns];
    write_columns(from, stride, bias, count, nullptr, all, kColumns);
    for (int c = 0; c < planes; ++c)
        for (int i = 0; i < count; ++i)
            to[c * plane + i] = all[c * kColumns + i] + (residual == nullptr ? 0 : residual[c * plane + i]);
}

// Reduces a vector to one number: joins its halves until one number is left.
template <class Join>
PC_INLINE float folded(Vector v, const Join& join) {
#ifdef __AVX512F__
    const __m256 low = _mm512_castps512_ps256(v),
                 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 eight = join(low, high);
#else
    const __m256 eight = v;
#endif
    const __m128 four = join(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = join(four, _mm_movehl_ps(four, four));
    return join(two, _mm_shuffle_ps(two, two, 1))[0];
}

PC_INLINE float least(Vector v) {
    return folded(v, [](auto a, auto b) { return a < b ? a : b; });
}

PC_INLINE float most(Vector v) {
    return folded(v, [](auto a, auto b) { return a > b ? a : b; });
}

PC_INLINE float total(Vector v) {
    return folded(v, [](auto a, auto b) { return a + b; });
}

// a > b ? a : b, in one instruction.
PC_INLINE Vector larger(Vector a, Vector b) {
#ifdef __AVX512F__
    return _mm512_max_ps(a, b);
#else
    return _mm256_max_ps(a, b);
#endif
}

// 2^x to 2e-7, for x up to 127. For x below -126 it is 2^-126.
PC_INLINE Vector power_of_two(Vector x) {
    const Vector zero{};
    x = larger(zero - 126, x);
#ifdef __AVX512F__
    const Vector whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
#else
    const Vector whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT);
#endif
    x = x - whole;
    Vector y = zero + 1.535336188e-4f;  // Cephes' polynomial
    y = y * x + 1.339887440e-3f;
    y = y * x + 9.618437357e-3f;
    y = y * x + 5.550332548e-2f;
    y = y * x + 2.402264791e-1f;
    y = y * x + 6.931472028e-1f;
    y = y * x + 1.0f;
#ifdef __AVX512F__
    return _mm512_scalef_ps(y, whole);
#else
    using Integers = int __attribute__((vector_size(sizeof(Vector))));
    const Integers exponent = (__builtin_convertvector(whole, Integers) + 127) << 23;
    return y * reinterpret_cast<Vector>(exponent);
#endif
}

constexpr float kLog2E = 1.44269504f;

// Reads a vector of a row of `width` numbers from `at` on; lanes beyond the row are zero.
PC_INLINE Vector read(const float* row, int at, int width) {
    if (at + kLanes <= width) return load(row + at);
    Vector v{};
    if (at < width) std::memcpy(&v, row + at, (width - at) * sizeof(float));
    return v;
}

// 1 / x to 2e-7, in a fraction of a division's time.
PC_INLINE Vector reciprocal(Vector x) {
#ifdef __AVX512F__
    const Vector y = _mm512_rcp14_ps(x);
#else
    const Vector y = _mm256_rcp_ps(x);
#endif
    return y * (2 - x * y);
}

PC_INLINE Vector silu(Vector x) {
    const Vector most = Vector{} + 126, power = x * -kLog2E;
    return x * reciprocal(1 + power_of_two(power > most ? most : power));
}

// x · Φ(x), erf to 2e-7 (Abramowitz and Stegun, 7.1.26).
PC_INLINE Vector gelu(Vector x) {
    const Vector zero{};
    const Vector z = (x < zero ? -x : x) * 0.707106781f;
    const Vector t = reciprocal(1 + z * 0.3275911f);
    Vector tail = zero + 1.061405429f;
    tail = tail * t - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    const Vector power = z * z * -kLog2E,
                 least = zero - 100;  // below, the tail's products would be subnormal
    tail = (tail * t + 0.254829592f) * t * power_of_two(power < least ? least : power);  // 1 - erf(z)
    return x * 0.5f * (x < zero ? tail : 2 - tail);
}

}  // namespace posecrafter
