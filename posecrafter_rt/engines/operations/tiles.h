// Products in eight bits by the processor's tiles (Intel AMX): up to 32 rows times a panel at once, the same sums as by
// VNNI, bit for bit. Layer 4.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bytes.h"

#ifdef PC_HAS_TILES

#include <sys/syscall.h>
#include <unistd.h>

namespace posecrafter {

constexpr int kTileRows = 16, kTileBytes = 64;
static_assert(kWhole == kTileBytes, "a depth is of whole tiles");

// Whether the system lets this process use tiles, which it must be asked for once: their 8 KiB are saved with a thread.
inline bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return may;
}

// What a thread's tiles are shaped as, as the processor reads it.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 for sums, 4 and 5 for rows, 6 and 7 for weights. Another library may have shaped this thread's otherwise.
inline void shape_tiles(int rows) {
    TileShapes wanted, current;
    for (int tile = 0; tile < 8; ++tile) {
        wanted.row_bytes[tile] = kTileBytes;
        wanted.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileRows);
    }
    _tile_storeconfig(&current);
    if (std::memcmp(&current, &wanted, sizeof wanted) != 0) _tile_loadconfig(&wanted);
}

// Which of `count` rows are wanted: of every `pitch` the first `used`, whose sums are `row_stride` floats from those of
// the `pitch` before.
struct TileRun {
    int count, used, pitch;
    size_t row_stride;
};

// Two groups of rows, from `first` and from `second` on, times a panel → their sums as integers, the second's after
// those of the rows that are in the first alone.
inline void multiply_groups(const ByteRows& rows, int first, int second, const float* panel, int* sums,
                            const Fetch& next) {
    constexpr size_t kLine = kPanel * kFour;  // bytes of a panel that meet four numbers of a row
    const auto* weights = reinterpret_cast<const int8_t*>(panel + 2 * kPanel);
    const uint8_t *upper = rows.first + first * rows.stride, *lower = rows.first + second * rows.stride;
    const Fetch next_upper = next.from(first), next_lower = next.from(second);
    const int fetches = ceil_div(kPanel, rows.segments * (rows.depth / kTileBytes));
    int fetched = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int segment = 0; segment < rows.segments; ++segment)
        for (size_t k = segment * rows.pitch; k < segment * rows.pitch + rows.depth; k += kTileBytes) {
            _tile_loadd(6, weights, kLine);
            _tile_loadd(4, upper + k, rows.stride);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(7, weights + kTileBytes, kLine);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(5, lower + k, rows.stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
            weights += kTileBytes * kPanel;
            for (int i = 0; i < fetches; ++i, ++fetched) next_upper.fetch(fetched), next_lower.fetch(fetched);
        }
    int* lower_sums = sums + (second - first) * kPanel;
    _tile_stored(0, sums, kPanel * sizeof(int));
    _tile_stored(1, sums + kLanes, kPanel * sizeof(int));
    _tile_stored(2, lower_sums, kPanel * sizeof(int));
    _tile_stored(3, lower_sums + kLanes, kPanel * sizeof(int));
}

// Sums of rows from `first` on, as integers, to where they go, as what they stand for.
inline void write_sums(const ByteRows& rows, int first, int count, const float* panel, const int* sums,
                       const TileRun& run, Sums out) {
    const Vector scales[] = {load(panel), load(panel + kLanes)};
    const Vector totals[] = {load(panel + kPanel), load(panel + kPanel + kLanes)};
    float* line = out.first + first / run.pitch * run.row_stride;
    int column = first % run.pitch;
    for (int r = 0; r < count; ++r, sums += kPanel) {
        const float scale = rows.scale[(first + r) * rows.step], low = rows.low[(first + r) * rows.step];
        if (column < run.used)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                Integers own;
                std::memcpy(&own, sums + half * kLanes, sizeof own);
                store(line + column * out.stride + half * kLanes, scaled(own, scales[half], totals[half], scale, low));
            }
        if (++column == run.pitch) column = 0, line += run.row_stride;
    }
}

// Rows times one panel, in pairs of groups of one size: the last ones may have rows of those before.
inline void multiply_tiles(const ByteRows& rows, TileRun run, const float* panel, Sums out, const Fetch& next) {
    const int pairs = ceil_div(run.count, 2 * kTileRows), height = ceil_div(run.count, 2 * pairs);
    const int last = run.count - height;
    alignas(64) int sums[2 * kTileRows * kPanel];
    shape_tiles(height);
    for (int pair = 0; pair < pairs; ++pair) {
        const int first = std::min(2 * pair * height, last), second = std::min(first + height, last);
        std::atomic_signal_fence(std::memory_order_seq_cst);  // a compiler need not know that tiles read memory
        multiply_groups(rows, first, second, panel, sums, next);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        write_sums(rows, first, second + height - first, panel, sums, run, out);
    }
}

}  // namespace posecrafter

#endif
