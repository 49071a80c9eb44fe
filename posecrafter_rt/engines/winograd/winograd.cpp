// F(4×4, 3×3) in three phases over chunks of tiles: pictures to 36 matrices, 36 matrix products, matrices to pictures.
// Layer 4. Vectors run over channels; planes are transposed to and from them in L1, eight columns by eight channels.
#include "winograd.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(POSECRAFTER_PORTABLE)
#define PC_WINOGRAD 1
#include <immintrin.h>
#define PC_AVX2 __attribute__((target("avx2,fma")))
#define PC_INLINE PC_AVX2 inline __attribute__((always_inline))
#endif

namespace posecrafter {

bool has_winograd() {
#ifdef PC_WINOGRAD
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

void winograd_pack(const float* weight, int in_channels, int out_channels, float* packed, const Parallel& parallel) {
    // G of F(4, 3) at the points 0, ±1, ±2 and infinity.
    static const double g[6][3] = {{1. / 4, 0, 0},
                                   {-1. / 6, -1. / 6, -1. / 6},
                                   {-1. / 6, 1. / 6, -1. / 6},
                                   {1. / 24, 1. / 12, 1. / 6},
                                   {1. / 24, -1. / 12, 1. / 6},
                                   {0, 0, 1}};
    const int panels = out_channels / kPanel;
    parallel(panels, [=](int panel) {
        for (int i = 0; i < in_channels; ++i) {
            double half[6][3][kPanel];
            for (int x = 0; x < 3; ++x)
                for (int o = 0; o < kPanel; ++o) {
                    const float* column = weight + (static_cast<size_t>(panel * kPanel + o) * in_channels + i) * 9 + x;
                    for (int a = 0; a < 6; ++a)
                        half[a][x][o] = g[a][0] * column[0] + g[a][1] * column[3] + g[a][2] * column[6];
                }
            for (int index = 0; index < kProducts; ++index) {
                const auto& row = half[index / 6];
                const double* column = g[index % 6];
                float* to = packed + ((static_cast<size_t>(index) * panels + panel) * in_channels + i) * kPanel;
                for (int o = 0; o < kPanel; ++o)
                    to[o] = static_cast<float>(row[0][o] * column[0] + row[1][o] * column[1] + row[2][o] * column[2]);
            }
        }
    });
}

#ifdef PC_WINOGRAD
namespace {

constexpr int kTile = 4, kPatch = 6;
constexpr int kRows = 6;        // tiles that the innermost loop computes at once: 12 accumulators of 16 registers
constexpr int kTaskTiles = 96;  // of one product, that one thread multiplies at a time
// Both matrices of a chunk stay in the cache that cores share; but a chunk reads all weights, so it has some tiles.
constexpr int kChunkFloats = 1 << 19, kLeastTiles = 48;

PC_INLINE void transpose(__m256 v[8]) {
    const __m256 a0 = _mm256_unpacklo_ps(v[0], v[1]), a1 = _mm256_unpackhi_ps(v[0], v[1]);
    const __m256 a2 = _mm256_unpacklo_ps(v[2], v[3]), a3 = _mm256_unpackhi_ps(v[2], v[3]);
    const __m256 a4 = _mm256_unpacklo_ps(v[4], v[5]), a5 = _mm256_unpackhi_ps(v[4], v[5]);
    const __m256 a6 = _mm256_unpacklo_ps(v[6], v[7]), a7 = _mm256_unpackhi_ps(v[6], v[7]);
    const __m256 b0 = _mm256_shuffle_ps(a0, a2, 0x44), b1 = _mm256_shuffle_ps(a0, a2, 0xee);
    const __m256 b2 = _mm256_shuffle_ps(a1, a3, 0x44), b3 = _mm256_shuffle_ps(a1, a3, 0xee);
    const __m256 b4 = _mm256_shuffle_ps(a4, a6, 0x44), b5 = _mm256_shuffle_ps(a4, a6, 0xee);
    const __m256 b6 = _mm256_shuffle_ps(a5, a7, 0x44), b7 = _mm256_shuffle_ps(a5, a7, 0xee);
    v[0] = _mm256_permute2f128_ps(b0, b4, 0x20), v[4] = _mm256_permute2f128_ps(b0, b4, 0x31);
    v[1] = _mm256_permute2f128_ps(b1, b5, 0x20), v[5] = _mm256_permute2f128_ps(b1, b5, 0x31);
    v[2] = _mm256_permute2f128_ps(b2, b6, 0x20), v[6] = _mm256_permute2f128_ps(b2, b6, 0x31);
    v[3] = _mm256_permute2f128_ps(b3, b7, 0x20), v[7] = _mm256_permute2f128_ps(b3, b7, 0x31);
}

// One column of Bᵀ d: six values to six.
PC_INLINE void transform_in(const __m256 d[6], __m256 t[6]) {
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

// One column of Aᵀ m: six values to four.
PC_INLINE void transform_out(const __m256 m[6], __m256 y[4]) {
    const __m256 two = _mm256_set1_ps(2), four = _mm256_set1_ps(4), eight = _mm256_set1_ps(8);
    const __m256 sum1 = _mm256_add_ps(m[1], m[2]), difference1 = _mm256_sub_ps(m[1], m[2]);
    const __m256 sum2 = _mm256_add_ps(m[3], m[4]), difference2 = _mm256_sub_ps(m[3], m[4]);
    y[0] = _mm256_add_ps(m[0], _mm256_add_ps(sum1, sum2));
    y[1] = _mm256_fmadd_ps(two, difference2, difference1);
    y[2] = _mm256_fmadd_ps(four, sum2, sum1);
    y[3] = _mm256_add_ps(_mm256_fmadd_ps(eight, difference2, difference1), m[5]);
}

// kCount tiles × 16 output channels of one of the 36 products. v: rows of in_channels; m: rows of out_channels.
template <int kCount>
PC_AVX2 void multiply(const float* v, const float* panel, float* m, int in_channels, int out_channels) {
    __m256 sums[kCount][2];
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (int k = 0; k < in_channels; ++k) {
        const __m256 left = _mm256_load_ps(panel + k * kPanel), right = _mm256_load_ps(panel + k * kPanel + kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kCount; ++r) {
            const __m256 value = _mm256_broadcast_ss(v + static_cast<size_t>(r) * in_channels + k);
            sums[r][0] = _mm256_fmadd_ps(value, left, sums[r][0]);
            sums[r][1] = _mm256_fmadd_ps(value, right, sums[r][1]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
        _mm256_store_ps(m + static_cast<size_t>(r) * out_channels, sums[r][0]);
        _mm256_store_ps(m + static_cast<size_t>(r) * out_channels + kLanes, sums[r][1]);
    }
}

using Multiply = void (*)(const float*, const float*, float*, int, int);
constexpr Multiply kMultiply[kRows + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                                           multiply<4>, multiply<5>, multiply<6>};

// Memory of one thread that grows to what its calls need, and stays: pages that are new at every call cost as much as a
// phase.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    float* take(size_t count) {
        if (count > count_) {
            std::free(memory_);
            memory_ = static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64));
            count_ = memory_ == nullptr ? 0 : count;
            if (memory_ == nullptr) throw std::bad_alloc();
        }
        return memory_;
    }

private:
    float* memory_ = nullptr;
    size_t count_ = 0;
};

// What all threads of one call share. A row is a row of tiles of one frame; a chunk is some rows.
struct Plan {
    const Convolution& call;
    int tiles_wide, tiles_high, rows, chunk_rows;
    int columns;                // of a line in a thread's scratch: the picture's, its padding, up to whole vectors
    size_t v_stride, m_stride;  // from one of the 36 matrices to the next, in floats

    explicit Plan(const Convolution& c) : call(c) {
        tiles_wide = (c.width + kTile - 1) / kTile;
        tiles_high = (c.height + kTile - 1) / kTile;
        rows = c.frames * tiles_high;
        const int64_t fitting = kChunkFloats / kProducts / (c.in_channels + c.out_channels);
        const int64_t tiles = std::max<int64_t>(kLeastTiles, fitting);
        chunk_rows = static_cast<int>(std::min<int64_t>(rows, std::max<int64_t>(1, tiles / tiles_wide)));
        columns = (tiles_wide * kTile + 2 + kLanes - 1) / kLanes * kLanes;
        const size_t chunk_tiles = static_cast<size_t>(chunk_rows) * tiles_wide;
        v_stride = chunk_tiles * c.in_channels + kPanel;  // no power of two, lest 36 streams share a cache set
        m_stride = chunk_tiles * c.out_channels + kPanel;
    }
};

// exp to 2e-7, by Cephes' polynomial.
PC_INLINE __m256 exponential(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87)), _mm256_set1_ps(88));
    const __m256 power = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    x = _mm256_fnmadd_ps(power, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(power, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.3981999507e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(8.3334519073e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(4.1665795894e-2f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.6666665459e-1f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(5.0000001201e-1f));
    y = _mm256_fmadd_ps(y, _mm256_mul_ps(x, x), _mm256_add_ps(x, _mm256_set1_ps(1)));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

PC_INLINE __m256 silu(__m256 x) {
    const __m256 one = _mm256_set1_ps(1);
    return _mm256_div_ps(x, _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

// One pixel of eight planes.
PC_INLINE __m256 pixel(const float* from, size_t plane) {
    alignas(32) float values[kLanes];
    for (int c = 0; c < kLanes; ++c) values[c] = from[c * plane];
    return _mm256_load_ps(values);
}

// Lines top…top+5 of eight channels of one frame, zeros around, as (6, columns, 8).
template <bool kIsNormed>
PC_AVX2 void gather(const Plan& plan, size_t channel, int top, float* lines) {
    const int height = plan.call.height, times = plan.call.times, width = plan.call.width / times;
    const size_t plane = static_cast<size_t>(height / times) * width;
    __m256 scale = _mm256_setzero_ps(), shift = scale;
    if (kIsNormed)
        scale = _mm256_loadu_ps(plan.call.scale + channel), shift = _mm256_loadu_ps(plan.call.shift + channel);
    const auto normed = [=](__m256 v) PC_AVX2 { return kIsNormed ? silu(_mm256_fmadd_ps(v, scale, shift)) : v; };
    for (int line = 0; line < kPatch; ++line) {
        float* to = lines + static_cast<size_t>(line) * plan.columns * kLanes;
        const int y = top + line;
        if (y < 0 || y >= height) {
            std::fill(to, to + static_cast<size_t>(plan.columns) * kLanes, 0.0f);
            continue;
        }
        const float* from = plan.call.input + channel * plane + static_cast<size_t>(y / times) * width;
        _mm256_store_ps(to, _mm256_setzero_ps());
        to += kLanes;
        for (int x = 0; x < width; x += kLanes) {
            const int count = std::min(kLanes, width - x);
            __m256 v[8];
            if (count == kLanes) {
                for (int c = 0; c < kLanes; ++c) v[c] = _mm256_loadu_ps(from + c * plane + x);
                transpose(v);
            } else {
                for (int i = 0; i < count; ++i) v[i] = pixel(from + x + i, plane);
            }
            for (int i = 0; i < count; ++i) {
                const __m256 value = normed(v[i]);
                for (int time = 0; time < times; ++time) _mm256_store_ps(to + ((x + i) * times + time) * kLanes, value);
            }
        }
        std::fill(to + width * times * kLanes, to + static_cast<size_t>(plan.columns - 1) * kLanes, 0.0f);
    }
}

// Bᵀ d B of a row of tiles and eight input channels. v: this row's first tile and channel in the first matrix.
PC_AVX2 void rows_to_matrices(const Plan& plan, const float* lines, float* v) {
    for (int tile = 0; tile < plan.tiles_wide; ++tile, v += plan.call.in_channels) {
        const float* patch = lines + tile * kTile * kLanes;
        __m256 half[kPatch][kPatch];  // [column][a]
        for (int x = 0; x < kPatch; ++x) {
            __m256 d[kPatch];
            for (int y = 0; y < kPatch; ++y)
                d[y] = _mm256_load_ps(patch + (static_cast<size_t>(y) * plan.columns + x) * kLanes);
            transform_in(d, half[x]);
        }
        for (int a = 0; a < kPatch; ++a) {
            __m256 d[kPatch], t[kPatch];
            for (int x = 0; x < kPatch; ++x) d[x] = half[x][a];
            transform_in(d, t);
            for (int b = 0; b < kPatch; ++b) _mm256_store_ps(v + (a * kPatch + b) * plan.v_stride, t[b]);
        }
    }
}

// Aᵀ m A of a row of tiles and eight output channels, plus the bias, as (4, columns, 8).
PC_AVX2 void matrices_to_rows(const Plan& plan, const float* m, const float* biases, float* lines) {
    const __m256 bias = _mm256_loadu_ps(biases);
    for (int tile = 0; tile < plan.tiles_wide; ++tile, m += plan.call.out_channels) {
        float* to = lines + tile * kTile * kLanes;
        __m256 half[kPatch][kTile];  // [a][x]
        for (int a = 0; a < kPatch; ++a) {
            __m256 row[kPatch];
            for (int b = 0; b < kPatch; ++b) row[b] = _mm256_load_ps(m + (a * kPatch + b) * plan.m_stride);
            transform_out(row, half[a]);
        }
        for (int x = 0; x < kTile; ++x) {
            __m256 column[kPatch], y[kTile];
            for (int a = 0; a < kPatch; ++a) column[a] = half[a][x];
            transform_out(column, y);
            for (int line = 0; line < kTile; ++line)
                _mm256_store_ps(to + (static_cast<size_t>(line) * plan.columns + x) * kLanes,
                                _mm256_add_ps(y[line], bias));
        }
    }
}

// (4, columns, 8) to lines top…top+3 of eight channels of one frame, without what lies beyond the picture.
PC_AVX2 void scatter(const Plan& plan, const float* lines, int top, float* planes) {
    const int height = plan.call.height, width = plan.call.width;
    const size_t plane = static_cast<size_t>(height) * width;
    for (int line = 0; line < std::min(kTile, height - top); ++line) {
        const float* from = lines + static_cast<size_t>(line) * plan.columns * kLanes;
        float* to = planes + static_cast<size_t>(top + line) * width;
        int x = 0;
        for (; x + kLanes <= width; x += kLanes) {
            __m256 v[8];
            for (int c = 0; c < kLanes; ++c) v[c] = _mm256_load_ps(from + (x + c) * kLanes);
            transpose(v);
            for (int c = 0; c < kLanes; ++c) _mm256_storeu_ps(to + c * plane + x, v[c]);
        }
        for (; x < width; ++x)
            for (int c = 0; c < kLanes; ++c) to[c * plane + x] = from[x * kLanes + c];
    }
}

// One call. A task of the first and the last phase is a row of tiles of eight channels; of the second, a part of a
// product.
class Job {
public:
    explicit Job(const Convolution& call) : plan_(call) {
        static thread_local Scratch scratch;
        v_ = scratch.take(kProducts * (plan_.v_stride + plan_.m_stride));
        m_ = v_ + kProducts * plan_.v_stride;
    }

    void run(const Parallel& parallel) const {
        const Convolution& c = plan_.call;
        for (int first = 0; first < plan_.rows; first += plan_.chunk_rows) {
            const int rows = std::min(plan_.chunk_rows, plan_.rows - first);
            const int tiles = rows * plan_.tiles_wide, parts = (tiles + kTaskTiles - 1) / kTaskTiles;
            parallel(rows * (c.in_channels / kLanes), [&](int task) { read(first, task % rows, task / rows); });
            parallel(kProducts * parts, [&](int task) { multiply_part(task / parts, task % parts, parts, tiles); });
            parallel(rows * (c.out_channels / kLanes), [&](int task) { write(first, task % rows, task / rows); });
        }
    }

private:
    float* lines() const {
        static thread_local Scratch scratch;
        return scratch.take(static_cast<size_t>(kPatch) * plan_.columns * kLanes);
    }

    void read(int first, int row, int group) const {
        const Convolution& c = plan_.call;
        const int frame = (first + row) / plan_.tiles_high, top = (first + row) % plan_.tiles_high * kTile - 1;
        const size_t channel = static_cast<size_t>(frame) * c.in_channels + group * kLanes;
        float* patches = lines();
        (c.scale == nullptr ? gather<false> : gather<true>)(plan_, channel, top, patches);
        const size_t tile = static_cast<size_t>(row) * plan_.tiles_wide;
        rows_to_matrices(plan_, patches, v_ + tile * c.in_channels + group * kLanes);
    }

    void multiply_part(int index, int part, int parts, int tiles) const {
        const Convolution& c = plan_.call;
        const int begin = static_cast<int>(int64_t{tiles} * part / parts);
        const int count = static_cast<int>(int64_t{tiles} * (part + 1) / parts) - begin;
        const int blocks = (count + kRows - 1) / kRows, panels = c.out_channels / kPanel;
        const float* v = v_ + index * plan_.v_stride;
        float* m = m_ + index * plan_.m_stride;
        for (int panel = 0; panel < panels; ++panel) {
            const float* weights = c.packed + (static_cast<size_t>(index) * panels + panel) * c.in_channels * kPanel;
            for (int block = 0; block < blocks; ++block) {  // of nearly equal sizes: a short one leaves lanes idle
                const int from = begin + count * block / blocks, to = begin + count * (block + 1) / blocks;
                kMultiply[to - from](v + static_cast<size_t>(from) * c.in_channels, weights,
                                     m + static_cast<size_t>(from) * c.out_channels + panel * kPanel, c.in_channels,
                                     c.out_channels);
            }
        }
    }

    void write(int first, int row, int group) const {
        const Convolution& c = plan_.call;
        const int frame = (first + row) / plan_.tiles_high, top = (first + row) % plan_.tiles_high * kTile;
        const size_t tile = static_cast<size_t>(row) * plan_.tiles_wide;
        float* patches = lines();
        matrices_to_rows(plan_, m_ + tile * c.out_channels + group * kLanes, c.bias + group * kLanes, patches);
        const size_t channel = static_cast<size_t>(frame) * c.out_channels + group * kLanes;
        scatter(plan_, patches, top, c.out + channel * c.height * c.width);
    }

    Plan plan_;
    float *v_, *m_;
};

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

void winograd_convolve(const Convolution& call, const Parallel& parallel) {
    if (call.frames > 0 && call.height > 0 && call.width > 0) Job(call).run(parallel);
}

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

void winograd_convolve(const Convolution&, const Parallel&) {}
void group_norm_scales(const GroupNorm&, const Parallel&) {}

#endif

}  // namespace posecrafter
