// Products in 16 bits, as linear maps and convolutions use them. Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vnni.h"
#include "words.h"

#ifdef PC_HAS_VNNI

namespace posecrafter {

// Their types and functions, like those of `Bytes`.
struct Words {
    using Number = int16_t;
    using Numbers = WordRows;
    static constexpr int kLighter = sizeof(float) / sizeof(int16_t);
    static constexpr bool kByVnni = true, kByTiles = false;

    static Numbers convert(Rows rows, int count, int depth, float* memory) {
        return rows_to_words(rows, count, depth, memory);
    }
    static size_t floats(int count, int depth) { return word_rows_floats(count, depth); }
    static constexpr int depth(int channels) { return word_depth(channels); }
    static constexpr size_t panel(int depth) { return word_panel(depth); }

    static void pack(const float* weight, int in_channels, int taps, int out_channels, float* packed,
                     const Parallel& parallel) {
        pack_words(weight, in_channels, taps, out_channels, packed, parallel);
    }

    static bool is_tiled() { return false; }

    // Pieces that are short enough for their sums to be exact.
    static int pieces(const Numbers& rows) { return rows.segments * ceil_div(rows.depth, kStretch); }

    static Piece piece(const Numbers& rows, int index) {
        const int per_segment = ceil_div(rows.depth, kStretch), most = word_depth(ceil_div(rows.depth, per_segment));
        const int begin = index % per_segment * most, depth = rows.depth - begin < most ? rows.depth - begin : most;
        const size_t segment = index / per_segment;
        return {segment * rows.pitch + begin, segment * rows.depth + begin, depth, 1, 0, index == 0,
                index + 1 == pieces(rows)};
    }

    static void multiply(const Numbers& rows, int count, const float* panel, Sums sums, const Fetch& next) {
        multiply_by_vnni<Words>(rows, count, panel, sums, next);
    }
};

}  // namespace posecrafter

#endif
