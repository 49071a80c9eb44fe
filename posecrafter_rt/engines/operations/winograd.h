// 3×3 convolutions of stride 1 and padding 1 in float32 on x86-64, by Winograd's minimal filtering: F(4×4, 3×3), 36
// products for a tile of 4×4 outputs in place of 144, or F(2×2, 3×3), 16 in place of 36, whose weights are less than
// half as large. Exact but for rounding. Layer 4: knows neither Python nor any library's tensors or threads.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015).
#pragma once

#include <cstddef>

#include "parallel.h"

namespace posecrafter {

// Of a tile of tile × tile outputs, 2 or 4: one for each pixel that it depends on.
constexpr int winograd_products(int tile) { return (tile + 2) * (tile + 2); }

// weight (out, in, 3, 3) → packed (products, out / panel, in, panel), as floats or halves; `packed` is 64 bytes
// aligned.
template <class Number>
void winograd_pack(const float* weight, int in_channels, int out_channels, int tile, Number* packed,
                   const Parallel& parallel);

// One convolution. Input channels are a multiple of a vector's floats, output channels of a panel's, which are two
// vectors; there are the first in_planes and out_planes of them, the others are zeros, or not written. All are compact:
// input (frames, in_planes, h / times, w / times), out (frames, out_planes, h, w), bias (out). It is of the input with
// each pixel repeated `times`, 1 or 2, in either direction, and where scale and shift (frames, in) are given of
// SiLU(input · scale + shift). A residual, as out, is added. In tiles of 2×2 weights may be halves; those of 4×4 would
// add up their rounding ten times as large.
struct Convolution {
    const float* input;
    const float* scale;
    const float* shift;
    const void* packed;
    const float* bias;
    const float* residual;
    float* out;
    int frames, in_channels, in_planes, out_channels, out_planes, height, width, times, tile;
    bool in_halves;
};

// threads: how many work at it at best.
void winograd_convolve(const Convolution& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
