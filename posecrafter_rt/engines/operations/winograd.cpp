// Winograd's filtering in three phases over chunks of tiles: pictures to matrices (one per product), matrix products,
// matrices to pictures. Layer 4. Vectors run over channels; planes are transposed to and from them in L1.
#include "winograd.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "memory.h"
#include "products.h"
#include "simd.h"
#include "transforms.h"

namespace posecrafter {

template <class Number>
void winograd_pack(const float* weight, int in_channels, int out_channels, int tile, Number* packed,
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
                Number* to = packed + ((static_cast<size_t>(index) * panels + panel) * in_channels + i) * kPanel;
                for (int v = 0; v < kPanel; v += kLanes) {
                    Vector numbers;
                    for (int o = v; o < v + kLanes; ++o)
                        numbers[o - v] =
                            static_cast<float>(row[0][o] * column[0] + row[1][o] * column[1] + row[2][o] * column[2]);
                    store(to + v, numbers);
                }
            }
        }
    });
}

template void winograd_pack(const float*, int, int, int, float*, const Parallel&);
template void winograd_pack(const float*, int, int, int, Half*, const Parallel&);

namespace {

constexpr int kTaskTiles = 96;  // of one product, which a thread multiplies at a time
// Both matrices of a chunk stay in a cache, unless one row of tiles fills it. A chunk reads all weights, so it has a
// least number of tiles. Fewer will do if the cache is a core's own; then threads need not wait for each other.
constexpr int kChunkFloats = 1 << 19, kLeastTiles = 96, kLeastOwnTiles = 24;

// The lines of a row of patches, and which row they are of.
struct Patches {
    Scratch memory;
    uint64_t call = 0;
    size_t channel = 0;
    int top = 0;
};

thread_local Scratch thread_matrices, thread_lines;  // for both sizes of tiles
thread_local Patches thread_patches;
std::atomic<uint64_t> num_calls{0};

// What all threads of one call share. A row is a row of tiles in one frame; a chunk is some rows.
template <int kTile>
struct Plan {
    static constexpr int kPatch = kTile + 2, kProducts = winograd_products(kTile);

    const Convolution& call;
    int tiles_wide, tiles_high, rows, chunk_rows;
    bool is_own;                // whether each chunk is one thread's, not shared by all
    int columns;                // of a line in a thread's scratch: picture and padding, up to whole vectors
    size_t v_stride, m_stride;  // from one matrix to the next, in floats

    Plan(const Convolution& c, int threads) : call(c) {
        tiles_wide = ceil_div(c.width, kTile);
        tiles_high = ceil_div(c.height, kTile);
        rows = c.frames * tiles_high;
        const int fitting = kChunkFloats / kProducts / (c.in_channels + c.out_channels);
        is_own = fitting >= kLeastOwnTiles && int64_t{rows} * tiles_wide >= int64_t{threads} * kLeastOwnTiles;
        int chunks = ceil_div(rows, std::max(1, (is_own ? fitting : std::max(kLeastTiles, fitting)) / tiles_wide));
        if (is_own) chunks = ceil_div(chunks, threads) * threads;
        chunk_rows = ceil_div(rows, chunks);
        columns = ceil_div(tiles_wide * kTile + 2, kColumns) * kColumns;
        const size_t chunk_tiles = static_cast<size_t>(chunk_rows) * tiles_wide;
        v_stride = chunk_tiles * c.in_channels + kPanel;  // no power of two: streams would share a cache set
        m_stride = chunk_tiles * c.out_channels + kPanel;
    }
};

// Gathers lines from `line` on of a row of patches that begins at `top`, for a vector's channels of one frame, with
// zeros around the picture. Only the first `planes` channels exist. Layout: (patch, columns, lanes).
template <int kTile, bool kIsNormed>
void gather(const Plan<kTile>& plan, size_t channel, int planes, int top, int line, float* lines) {
    const int height = plan.call.height, times = plan.call.times, width = plan.call.width / times;
    const size_t plane = static_cast<size_t>(height / times) * width;
    Vector scale{}, shift{};
    if (kIsNormed) scale = load(plan.call.scale + channel), shift = load(plan.call.shift + channel);
    for (; line < plan.kPatch; ++line) {
        float* to = lines + static_cast<size_t>(line) * plan.columns * kLanes;
        const int y = top + line;
        if (y < 0 || y >= height) {
            std::fill(to, to + static_cast<size_t>(plan.columns) * kLanes, 0.0f);
            continue;
        }
        const float* from = plan.call.input + channel * plane + static_cast<size_t>(y / times) * width;
        store(to, Vector{});
        to += kLanes;
        for (int x = 0; x < width; x += kColumns) {
            const int count = std::min(kColumns, width - x);
            Vector v[kColumns];
            read_columns_of(planes, from + x, plane, count, v);
            for (int i = 0; i < count; ++i) {
                const Vector value = kIsNormed ? silu(v[i] * scale + shift) : v[i];
                for (int time = 0; time < times; ++time) store(to + ((x + i) * times + time) * kLanes, value);
            }
        }
        std::fill(to + width * times * kLanes, to + static_cast<size_t>(plan.columns - 1) * kLanes, 0.0f);
    }
}

// Computes Bᵀ d B for a row of tiles and a vector's input channels. v: the row's first tile and channel in the first
// matrix.
template <int kTile>
void rows_to_matrices(const Plan<kTile>& plan, const float* lines, float* v) {
    constexpr int kPatch = Plan<kTile>::kPatch;
    for (int tile = 0; tile < plan.tiles_wide; ++tile, v += plan.call.in_channels) {
        const float* patch = lines + tile * kTile * kLanes;
        Vector half[kPatch][kPatch];  // [column][a]
        for (int x = 0; x < kPatch; ++x) {
            Vector d[kPatch];
            for (int y = 0; y < kPatch; ++y) d[y] = load(patch + (static_cast<size_t>(y) * plan.columns + x) * kLanes);
            transform_in(d, half[x]);
        }
        for (int a = 0; a < kPatch; ++a) {
            Vector d[kPatch], t[kPatch];
            for (int x = 0; x < kPatch; ++x) d[x] = half[x][a];
            transform_in(d, t);
            for (int b = 0; b < kPatch; ++b) store(v + (a * kPatch + b) * plan.v_stride, t[b]);
        }
    }
}

// Computes Aᵀ m A plus the bias for a row of tiles and a vector's output channels, as (tile, columns, lanes).
template <int kTile>
void matrices_to_rows(const Plan<kTile>& plan, const float* m, const float* biases, float* lines) {
    constexpr int kPatch = Plan<kTile>::kPatch;
    const Vector bias = load(biases);
    for (int tile = 0; tile < plan.tiles_wide; ++tile, m += plan.call.out_channels) {
        float* to = lines + tile * kTile * kLanes;
        Vector half[kPatch][kTile];  // [a][x]
        for (int a = 0; a < kPatch; ++a) {
            Vector row[kPatch];
            for (int b = 0; b < kPatch; ++b) row[b] = load(m + (a * kPatch + b) * plan.m_stride);
            transform_out(row, half[a]);
        }
        for (int x = 0; x < kTile; ++x) {
            Vector column[kPatch], y[kTile];
            for (int a = 0; a < kPatch; ++a) column[a] = half[a][x];
            transform_out(column, y);
            for (int line = 0; line < kTile; ++line)
                store(to + (static_cast<size_t>(line) * plan.columns + x) * kLanes, y[line] + bias);
        }
    }
}

// Writes (tile, columns, lanes) to the lines from `top` on of a vector's first channels in one frame, without what lies
// beyond the picture, and adds the residual if there is one.
template <int kTile>
void scatter(const Plan<kTile>& plan, const float* lines, int top, int planes, size_t channel) {
    const int height = plan.call.height, width = plan.call.width;
    const size_t plane = static_cast<size_t>(height) * width;
    const float* residual = plan.call.residual;
    for (int line = 0; line < std::min(kTile, height - top); ++line) {
        const float* from = lines + static_cast<size_t>(line) * plan.columns * kLanes;
        const size_t at = channel * plane + static_cast<size_t>(top + line) * width;
        for (int x = 0; x < width; x += kColumns)
            write_columns_of(planes, from + x * kLanes, kLanes, Vector{}, std::min(kColumns, width - x),
                             residual == nullptr ? nullptr : residual + at + x, plan.call.out + at + x, plane);
    }
}

// One call. In the first and last phase of a chunk, a task is a row of tiles of a vector's channels; in the second, it
// is a part of a product.
template <int kTile, class Number>
class Job {
public:
    Job(const Convolution& call, int threads) : plan_(call, threads) {}

    void run(const Parallel& parallel) const {
        const int chunks = ceil_div(plan_.rows, plan_.chunk_rows);
        if (plan_.is_own)
            parallel(chunks, [&](int chunk) { run_chunk(chunk, alone); });
        else
            for (int chunk = 0; chunk < chunks; ++chunk) run_chunk(chunk, parallel);
    }

private:
    static constexpr int kProducts = Plan<kTile>::kProducts;

    void run_chunk(int chunk, const Parallel& parallel) const {
        const Convolution& c = plan_.call;
        float* v = thread_matrices.take(kProducts * (plan_.v_stride + plan_.m_stride));
        float* m = v + kProducts * plan_.v_stride;
        const int first = chunk * plan_.chunk_rows, rows = std::min(plan_.chunk_rows, plan_.rows - first);
        const int tiles = rows * plan_.tiles_wide, parts = ceil_div(tiles, kTaskTiles);
        parallel(rows * (c.in_channels / kLanes), [&](int task) { read(first, task % rows, task / rows, v); });
        parallel(kProducts * parts, [&](int task) { multiply_part(v, task / parts, task % parts, parts, tiles, m); });
        parallel(rows * ceil_div(c.out_planes, kLanes), [&](int task) { write(m, first, task % rows, task / rows); });
    }

    size_t line() const { return static_cast<size_t>(plan_.columns) * kLanes; }

    // Returns how many lines this thread has already gathered, for the row of patches above. If tasks go in order, that
    // was its last row.
    int shared_lines(size_t channel, int top) const {
        Patches& last = thread_patches;
        const bool is_next = last.call == id_ && last.channel == channel && last.top + kTile == top;
        last.call = id_, last.channel = channel, last.top = top;
        return is_next ? plan_.kPatch - kTile : 0;
    }

    void read(int first, int row, int group, float* v) const {
        const Convolution& c = plan_.call;
        const int frame = (first + row) / plan_.tiles_high, top = (first + row) % plan_.tiles_high * kTile - 1;
        const size_t channel = static_cast<size_t>(frame) * c.in_planes + group * kLanes;
        const int planes = c.in_planes - group * kLanes;
        const int known = shared_lines(channel, top);
        float* patches = thread_patches.memory.take(line() * plan_.kPatch);
        if (known > 0) std::copy_n(patches + kTile * line(), known * line(), patches);
        (c.scale == nullptr ? gather<kTile, false> : gather<kTile, true>)(plan_, channel, planes, top, known, patches);
        const size_t tile = static_cast<size_t>(row) * plan_.tiles_wide;
        rows_to_matrices(plan_, patches, v + tile * c.in_channels + group * kLanes);
    }

    void multiply_part(const float* v, int index, int part, int parts, int tiles, float* m) const {
        const Convolution& c = plan_.call;
        const int begin = static_cast<int>(int64_t{tiles} * part / parts);
        const int count = static_cast<int>(int64_t{tiles} * (part + 1) / parts) - begin;
        const int panels = c.out_channels / kPanel;
        v += index * plan_.v_stride + static_cast<size_t>(begin) * c.in_channels;
        m += index * plan_.m_stride + static_cast<size_t>(begin) * c.out_channels;
        const auto packed = static_cast<const Number*>(c.packed);
        for (int panel = 0; panel < panels; ++panel) {
            const Number* weights = packed + (static_cast<size_t>(index) * panels + panel) * c.in_channels * kPanel;
            const auto multiply =
                c.out_planes > kLanes ? multiply_rows<false, 2, Number> : multiply_rows<false, 1, Number>;
            multiply({v, static_cast<size_t>(c.in_channels)}, count, weights, c.in_channels, m + panel * kPanel,
                     c.out_channels);
        }
    }

    void write(const float* m, int first, int row, int group) const {
        const Convolution& c = plan_.call;
        const int frame = (first + row) / plan_.tiles_high, top = (first + row) % plan_.tiles_high * kTile;
        const size_t tile = static_cast<size_t>(row) * plan_.tiles_wide;
        float* patches = thread_lines.take(line() * kTile);
        matrices_to_rows(plan_, m + tile * c.out_channels + group * kLanes, c.bias + group * kLanes, patches);
        const int before = group * kLanes;
        scatter(plan_, patches, top, c.out_planes - before, static_cast<size_t>(frame) * c.out_planes + before);
    }

    Plan<kTile> plan_;
    const uint64_t id_ = ++num_calls;
};

}  // namespace

void winograd_convolve(const Convolution& call, int threads, const Parallel& parallel) {
    if (call.frames == 0 || call.height == 0 || call.width == 0) return;
    if (call.tile == 4)
        Job<4, float>(call, threads).run(parallel);
    else if (call.in_halves)
        Job<2, Half>(call, threads).run(parallel);
    else
        Job<2, float>(call, threads).run(parallel);
}

}  // namespace posecrafter
