// Products in two digits of eight bits, as linear maps and convolutions use them. Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>

#include "digits.h"
#include "tiles.h"

#ifdef PC_HAS_TILES

namespace posecrafter {

// Their types and functions, like those of `Bytes`.
struct Digits {
    using Number = uint8_t;
    using Numbers = DigitRows;
    static constexpr int kLighter = sizeof(float) / 2;
    static constexpr bool kByVnni = false, kByTiles = true;

    static Numbers convert(Rows rows, int count, int depth, float* memory) {
        return rows_to_digits(rows, count, depth, memory);
    }
    static size_t floats(int count, int depth) { return digit_rows_floats(count, depth); }
    static constexpr int depth(int channels) { return byte_depth(channels); }
    static constexpr size_t panel(int depth) { return digit_panel(depth); }

    static void pack(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                     const Parallel& parallel) {
        pack_digits(weight, in_channels, taps, out_channels, packed, parallel);
    }

    static bool is_tiled() { return true; }
    static void multiply(const Numbers& rows, int count, const float* panel, Sums sums, const Fetch& next) {
        multiply_tiles(rows, {count, count, count, 0}, panel, sums, next);
    }
};

}  // namespace posecrafter

#endif
