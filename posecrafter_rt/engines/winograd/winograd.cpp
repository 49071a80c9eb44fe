// Winograd's filtering in three phases over chunks of tiles: pictures to matrices, one for each product, matrix
// products, matrices to pictures. Layer 4. Vectors run over channels; planes are transposed to and from them in L1,
// eight columns by eight channels.
#include "winograd.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "simd.h"
#include "transforms.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace posecrafter {

constexpr size_t kLargePage = 1 << 21;

bool has_winograd() {
#ifdef PC_WINOGRAD
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return false;
#endif
}

float* allocate_floats(size_t count) {
    const size_t page = count * sizeof(float) < kLargePage ? 64 : kLargePage;
    const size_t bytes = (count * sizeof(float) + page - 1) / page * page;
    void* memory = std::aligned_alloc(page, bytes);
#ifdef MADV_HUGEPAGE
    if (memory != nullptr && page == kLargePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<float*>(memory);
}

void winograd_pack(const float* weight, int in_channels, int out_channels, int tile, float* packed,
                   const Parallel& parallel) {
    const int panels = out_channels / kPanel, patch = tile + 2;
    const auto g = weight_transform(tile);
    parallel(panels, [=](int panel) {
        for (int i = 0; i < in_channels; ++i) {
            double half[6][3][kPanel];
            for (int x = 0; x < 3; ++x)
                for (int o = 0; o < kPanel; ++o) {
                    const float* column = weight + (static_cast<size_t>(panel * kPanel + o) * in_channels + i) * 9 + x;
                    for (int a = 0; a < patch; ++a)
                        half[a][x][o] = g[a][0] * column[0] + g[a][1] * column[3] + g[a][2] * column[6];
                }
            for (int index = 0; index < patch * patch; ++index) {
                const auto& row = half[index / patch];
                const double* column = g[index % patch];
                float* to = packed + ((static_cast<size_t>(index) * panels + panel) * in_channels + i) * kPanel;
                for (int o = 0; o < kPanel; ++o)
                    to[o] = static_cast<float>(row[0][o] * column[0] + row[1][o] * column[1] + row[2][o] * column[2]);
            }
        }
    });
}

#ifdef PC_WINOGRAD
namespace {

constexpr int kRows = 6;        // tiles that the innermost loop computes at once: 12 accumulators of 16 registers
constexpr int kTaskTiles = 96;  // of one product, that one thread multiplies at a time
// Both matrices of a chunk stay in the cache that cores share; but a chunk reads all weights, so it has some tiles.
constexpr int kChunkFloats = 1 << 19, kLeastTiles = 96;

// kCount tiles × 16 output channels of one of the products. v: rows of in_channels; m: rows of out_channels.
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
            memory_ = allocate_floats(count);
            count_ = memory_ == nullptr ? 0 : count;
            if (memory_ == nullptr) throw std::bad_alloc();
        }
        return memory_;
    }

private:
    float* memory_ = nullptr;
    size_t count_ = 0;
};

thread_local Scratch thread_matrices, thread_lines;  // of both tiles

// What all threads of one call share. A row is a row of tiles of one frame; a chunk is some rows.
template <int kTile>
struct Plan {
    static constexpr int kPatch = kTile + 2, kProducts = kPatch * kPatch;

    const Convolution& call;
    int tiles_wide, tiles_high, rows, chunk_rows;
    int columns;                // of a line in a thread's scratch: the picture's, its padding, up to whole vectors
    size_t v_stride, m_stride;  // from one matrix to the next, in floats

    explicit Plan(const Convolution& c) : call(c) {
        tiles_wide = (c.width + kTile - 1) / kTile;
        tiles_high = (c.height + kTile - 1) / kTile;
        rows = c.frames * tiles_high;
        const int64_t fitting = kChunkFloats / kProducts / (c.in_channels + c.out_channels);
        const int64_t tiles = std::max<int64_t>(kLeastTiles, fitting);
        chunk_rows = static_cast<int>(std::min<int64_t>(rows, std::max<int64_t>(1, tiles / tiles_wide)));
        columns = (tiles_wide * kTile + 2 + kLanes - 1) / kLanes * kLanes;
        const size_t chunk_tiles = static_cast<size_t>(chunk_rows) * tiles_wide;
        v_stride = chunk_tiles * c.in_channels + kPanel;  // no power of two, lest all streams share a cache set
        m_stride = chunk_tiles * c.out_channels + kPanel;
    }
};

// One pixel of eight planes.
PC_INLINE __m256 pixel(const float* from, size_t plane) {
    alignas(32) float values[kLanes];
    for (int c = 0; c < kLanes; ++c) values[c] = from[c * plane];
    return _mm256_load_ps(values);
}

// The lines of a row of patches from top on of eight channels of one frame, zeros around, as (patch, columns, 8).
template <int kTile, bool kIsNormed>
PC_AVX2 void gather(const Plan<kTile>& plan, size_t channel, int top, float* lines) {
    const int height = plan.call.height, times = plan.call.times, width = plan.call.width / times;
    const size_t plane = static_cast<size_t>(height / times) * width;
    __m256 scale = _mm256_setzero_ps(), shift = scale;
    if (kIsNormed)
        scale = _mm256_loadu_ps(plan.call.scale + channel), shift = _mm256_loadu_ps(plan.call.shift + channel);
    const auto normed = [=](__m256 v) PC_AVX2 { return kIsNormed ? silu(_mm256_fmadd_ps(v, scale, shift)) : v; };
    for (int line = 0; line < plan.kPatch; ++line) {
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
template <int kTile>
PC_AVX2 void rows_to_matrices(const Plan<kTile>& plan, const float* lines, float* v) {
    constexpr int kPatch = Plan<kTile>::kPatch;
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

// Aᵀ m A of a row of tiles and eight output channels, plus the bias, as (tile, columns, 8).
template <int kTile>
PC_AVX2 void matrices_to_rows(const Plan<kTile>& plan, const float* m, const float* biases, float* lines) {
    constexpr int kPatch = Plan<kTile>::kPatch;
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

// (tile, columns, 8) to lines from top on of eight channels of one frame, without what lies beyond the picture.
template <int kTile>
PC_AVX2 void scatter(const Plan<kTile>& plan, const float* lines, int top, float* planes) {
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
template <int kTile>
class Job {
public:
    explicit Job(const Convolution& call) : plan_(call) {
        v_ = thread_matrices.take(kProducts * (plan_.v_stride + plan_.m_stride));
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
    static constexpr int kProducts = Plan<kTile>::kProducts;

    float* lines() const { return thread_lines.take(static_cast<size_t>(plan_.kPatch) * plan_.columns * kLanes); }

    void read(int first, int row, int group) const {
        const Convolution& c = plan_.call;
        const int frame = (first + row) / plan_.tiles_high, top = (first + row) % plan_.tiles_high * kTile - 1;
        const size_t channel = static_cast<size_t>(frame) * c.in_channels + group * kLanes;
        float* patches = lines();
        (c.scale == nullptr ? gather<kTile, false> : gather<kTile, true>)(plan_, channel, top, patches);
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

    Plan<kTile> plan_;
    float *v_, *m_;
};

}  // namespace

void winograd_convolve(const Convolution& call, const Parallel& parallel) {
    if (call.frames == 0 || call.height == 0 || call.width == 0) return;
    if (call.tile == 2)
        Job<2>(call).run(parallel);
    else
        Job<4>(call).run(parallel);
}

#else

void winograd_convolve(const Convolution&, const Parallel&) {}

#endif

}  // namespace posecrafter
