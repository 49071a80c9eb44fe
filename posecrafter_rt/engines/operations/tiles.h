// Products in eight bits, and in two digits of eight bits, with the processor's tiles (Intel AMX): up to 32 rows times
// a panel at once. Sums of 8-bit products equal those of VNNI bit for bit. Layer 4.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "digits.h"

#ifdef PC_HAS_TILES

#include <sys/syscall.h>
#include <unistd.h>

namespace posecrafter {

constexpr int kTileRows = 16, kTileBytes = 64;
static_assert(kWhole == kTileBytes, "a depth is of whole tiles");

// Whether the system lets this process use tiles. It must be asked once, because tiles add 8 KiB to a thread's saved
// state.
inline bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return may;
}

// The shapes of a thread's tiles, as the processor reads them.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 are for sums, 4 and 5 for rows, 6 and 7 for weights. Another library may have left other shapes in this
// thread.
inline void shape_tiles(int rows) {
    TileShapes wanted, current;
    for (int tile = 0; tile < 8; ++tile) {
        wanted.row_bytes[tile] = kTileBytes;
        wanted.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kTileRows);
    }
    _tile_storeconfig(&current);
    if (std::memcmp(&current, &wanted, sizeof wanted) != 0) _tile_loadconfig(&wanted);
}

// Which of `count` rows are wanted: the first `used` of every `pitch`. Their sums are `row_stride` floats after those
// of the `pitch` rows before.
struct TileRun {
    int count, used, pitch;
    size_t row_stride;
};

// Two groups of at most kTileRows rows that are multiplied together. They begin at `first` and `second`.
struct Groups {
    int first, second;
};

constexpr int kGroupSums = 2 * kTileRows * kPanel;  // the sums of both groups

// In how many parts of its columns a panel is multiplied. Four tiles of sums hold all of a panel of bytes, or half of a
// panel of digits. Also, a deep panel of digits and the one after it would not fit a core's second-level cache.
template <class Numbers>
constexpr int kParts = 1;
template <>
constexpr int kParts<DigitRows> = 2;

// Prefetches while products are computed, a little at each step: the memory that is written next, and the part of a
// panel that follows, into the second-level cache.
class Meanwhile {
public:
    Meanwhile(const ByteRows& rows, int pairs, const float* panel, const Fetch& next)
        : Meanwhile(rows, pairs, panel, byte_panel(rows.segments * rows.depth), next) {}
    Meanwhile(const DigitRows& rows, int pairs, const float* panel, const Fetch& next)
        : Meanwhile(rows.high, pairs, panel, digit_panel(rows.high.segments * rows.high.depth) / 2, next) {}

    PC_INLINE void fetch(Groups groups, int step) {
        if (step * fetches_ < kPanel) {
            const Fetch upper = next_.from(groups.first), lower = next_.from(groups.second);
            for (int i = step * fetches_; i < (step + 1) * fetches_; ++i) upper.fetch(i), lower.fetch(i);
        }
        for (int line = 0; line < lines_; ++line, ahead_ += kLine) __builtin_prefetch(ahead_, 0, 2);
    }

private:
    static constexpr size_t kLine = 64 / sizeof(float);

    // floats: the size of a part.
    Meanwhile(const ByteRows& rows, int pairs, const float* panel, size_t floats, const Fetch& next)
        : next_(next), ahead_(panel + floats) {
        const int steps = rows.segments * (rows.depth / kWhole);
        fetches_ = ceil_div(kPanel, steps), lines_ = ceil_div(static_cast<int>(floats / kLine), steps * pairs);
    }

    Fetch next_;
    const float* ahead_;
    int fetches_, lines_;
};

PC_INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Stores each group's two tiles of sums, `apart` from each other. Groups may share rows, so the second group's sums
// begin after those of the rows that are only in the first.
PC_INLINE void store_sums(Groups groups, int* sums, int apart) {
    constexpr size_t kStride = kPanel * sizeof(int);
    int* lower_sums = sums + (groups.second - groups.first) * kPanel;
    _tile_stored(0, sums, kStride);
    _tile_stored(1, sums + apart, kStride);
    _tile_stored(2, lower_sums, kStride);
    _tile_stored(3, lower_sums + apart, kStride);
}

// Multiplies both groups by a panel of bytes and stores the sums as integers.
inline void multiply_groups(const ByteRows& rows, Groups groups, const float* panel, int, int* sums, Meanwhile& next) {
    constexpr size_t kLine = kPanel * kFour;  // bytes of a panel for four numbers of a row
    const auto* weights = reinterpret_cast<const int8_t*>(panel + 2 * kPanel);
    const uint8_t *upper = rows.first + groups.first * rows.stride, *lower = rows.first + groups.second * rows.stride;
    zero_sums();
    int step = 0;
    for (int segment = 0; segment < rows.segments; ++segment)
        for (size_t k = segment * rows.pitch; k < segment * rows.pitch + rows.depth; k += kWhole, ++step) {
            _tile_loadd(6, weights, kLine);
            _tile_loadd(4, upper + k, rows.stride);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(7, weights + kTileBytes, kLine);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(5, lower + k, rows.stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
            weights += kWhole * kPanel;
            next.fetch(groups, step);
        }
    store_sums(groups, sums, kLanes);
}

// The same for half a panel of digits. Stores the sums of high × high and, kGroupSums later, of high × low plus low ×
// high.
inline void multiply_groups(const DigitRows& rows, Groups groups, const float* panel, int half, int* sums,
                            Meanwhile& next) {
    const size_t stride = rows.high.stride, depth = static_cast<size_t>(rows.high.segments) * rows.high.depth;
    const auto* weights = reinterpret_cast<const int8_t*>(panel + 2 * kPanel) + half * depth * kPanel;
    const uint8_t *upper = rows.high.first + groups.first * stride, *lower = rows.high.first + groups.second * stride;
    zero_sums();
    int step = half * kPanel;
    for (int segment = 0; segment < rows.high.segments; ++segment) {
        const size_t begin = segment * rows.high.pitch;
        for (size_t k = begin; k < begin + rows.high.depth; k += kWhole, ++step) {
            _tile_loadd(6, weights, kTileBytes);
            _tile_loadd(4, upper + k, stride);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(7, weights + kTileRows * kTileBytes, kTileBytes);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(5, lower + k, stride);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
            _tile_loadd(4, upper + rows.lower + k, stride);
            _tile_dpbssd(1, 4, 6);
            _tile_loadd(5, lower + rows.lower + k, stride);
            _tile_dpbssd(3, 5, 6);
            weights += 2 * kTileRows * kTileBytes;
            next.fetch(groups, step);
        }
    }
    store_sums(groups, sums, kGroupSums);
}

PC_INLINE Vector floats_of(const int* sums) {
    Integers own;
    std::memcpy(&own, sums, sizeof own);
    return __builtin_convertvector(own, Vector);
}

// Returns a vector of a row's sums as `multiply_groups` stored them.
PC_INLINE Vector sums_of(const ByteRows&, const int* sums) { return floats_of(sums); }
PC_INLINE Vector sums_of(const DigitRows&, const int* sums) {
    return (floats_of(sums) * kDigit + floats_of(sums + kGroupSums)) * kDigit;
}

inline const ByteRows& scales_of(const ByteRows& rows) { return rows; }
inline const ByteRows& scales_of(const DigitRows& rows) { return rows.high; }

// Scales the sums of `count` rows from `first` on and writes them to `out`. panel: begins at the part's first column.
template <class Numbers>
void write_sums(const Numbers& numbers, int first, int count, const float* panel, const int* sums, Sums out) {
    constexpr int kVectors = 2 / kParts<Numbers>;
    const ByteRows rows = scales_of(numbers).from(first);
    Vector scales[kVectors], totals[kVectors];
    for (int v = 0; v < kVectors; ++v)
        scales[v] = load(panel + v * kLanes), totals[v] = load(panel + kPanel + v * kLanes);
    const float *scale = rows.scale, *low = rows.low;
    float* to = out.first;
    for (int r = 0; r < count; ++r, sums += kPanel, to += out.stride, scale += rows.step, low += rows.step)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
            store(to + v * kLanes, scaled(sums_of(numbers, sums + v * kLanes), scales[v], totals[v], *scale, *low));
}

// Writes the sums of rows `first` to `end` that the run wants.
template <class Numbers>
void write_run(const Numbers& numbers, int first, int end, const float* panel, const int* sums, const TileRun& run,
               Sums out) {
    for (int at = first, next; at < end; at = next) {
        const int column = at % run.pitch;
        next = std::min(end, at - column + run.pitch);
        const int count = std::min(next - at, run.used - column);
        const Sums to = Sums{out.first + at / run.pitch * run.row_stride, out.stride}.from(column);
        if (count > 0) write_sums(numbers, at, count, panel, sums + (at - first) * kPanel, to);
    }
}

// Multiplies rows by one panel, which another follows, in pairs of groups of one size. The last group may repeat rows
// of the one before.
template <class Numbers>
void multiply_tiles(const Numbers& rows, TileRun run, const float* panel, Sums out, const Fetch& next) {
    const int pairs = ceil_div(run.count, 2 * kTileRows), height = ceil_div(run.count, 2 * pairs);
    const int last = run.count - height;
    alignas(64) int sums[2 * kGroupSums];
    Meanwhile meanwhile(rows, pairs, panel, next);
    shape_tiles(height);
    for (int task = 0; task < pairs * kParts<Numbers>; ++task) {
        const int pair = task % pairs, part = task / pairs, column = part * kPanel / kParts<Numbers>;
        const int first = std::min(2 * pair * height, last), second = std::min(first + height, last);
        std::atomic_signal_fence(std::memory_order_seq_cst);  // the compiler may not know that tiles read memory
        multiply_groups(rows, {first, second}, panel, part, sums, meanwhile);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        write_run(rows, first, second + height, panel + column, sums, run, {out.first + column, out.stride});
    }
}

}  // namespace posecrafter

#endif
