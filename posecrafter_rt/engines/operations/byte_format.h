// Products in eight bits, as linear maps and convolutions use them. Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bytes.h"
#include "tiles.h"
#include "vnni.h"

namespace posecrafter {

// The types and functions of products in eight bits, for `Job` and `PictureOf`.
struct Bytes {
    using Number = uint8_t;
    using Numbers = ByteRows;
    static constexpr int kLighter = sizeof(float);                    // how many times as light as a float a weight is
    static constexpr bool kByVnni = true, kByTiles = kWhole > kFour;  // which instructions can multiply them

    static Numbers convert(Rows rows, int count, int depth, float* memory) {
        return rows_to_bytes(rows, count, depth, memory);
    }
    static size_t floats(int count, int depth) { return byte_rows_floats(count, depth); }

    // How many numbers a pixel of `channels` channels takes, padding included.
    static constexpr int depth(int channels) { return byte_depth(channels); }

    // The size of a panel of weights, in floats.
    static constexpr size_t panel(int depth) { return byte_panel(depth); }

    static void pack(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                     const Parallel& parallel) {
        pack_bytes(weight, in_channels, taps, out_channels, packed, parallel);
    }

    static bool is_tiled() {
#ifdef PC_HAS_TILES
        return may_use_tiles();
#else
        return false;
#endif
    }

#ifdef PC_HAS_VNNI
    // One piece, because its sums are exact.
    static int pieces(const Numbers&) { return 1; }
    static Piece piece(const Numbers& rows, int) { return {0, 0, rows.depth, rows.segments, rows.pitch, true, true}; }

    // Multiplies any number of rows by one panel.
    static void multiply(const Numbers& rows, int count, const float* panel, Sums sums, const Fetch& next) {
#ifdef PC_HAS_TILES
        if (is_tiled()) return multiply_tiles(rows, {count, count, count, 0}, panel, sums, next);
#endif
        multiply_by_vnni<Bytes>(rows, count, panel, sums, next);
    }
#endif
};

}  // namespace posecrafter
