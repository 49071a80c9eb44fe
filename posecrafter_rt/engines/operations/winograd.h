// 3×3 convolutions of stride 1 and padding 1 in float32 on x86-64, by Winograd's minimal filtering. F(4×4, 3×3) takes
// 36 products for a tile of 4×4 outputs instead of 144. F(2×2, 3×3) takes 16 instead of 36, and its transformed
// weights are less than half as large as the other's. Exact but for rounding. Layer 4: knows neither Python nor any
// library's tensors or threads.
// Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015).
#pragma once

#include <cstddef>

#include "parallel.h"

namespace posecrafter {

// Products of a tile of tile × tile outputs (2 or 4): one for each pixel that it depends on.
constexpr int winograd_products(int tile) { return (tile + 2) * (tile + 2); }

// Packs weight (out, in, 3, 3) as (products, out / panel, in, panel), in floats or halves. `packed` is 64-byte aligned.
template <class Number>
void winograd_pack(const float* weight, int in_channels, int out_channels, int tile, Number* packed,
                   const Parallel& parallel);

// One convolution. Input channels are a multiple of a vector's floats, output channels of a panel, which is two
// vectors. Only the first in_planes and out_planes of them exist: other inputs are zero, other outputs are not written.
// All are compact: input (frames, in_planes, h / times, w / times), out (frames, out_planes, h, w), bias (out). Each
// pixel of the input is repeated `times` (1 or 2) in both directions. With scale and shift (frames, in), the
// convolution is of SiLU(input · scale + shift). A residual, with out's shape, is added. With tiles of 2×2, weights may
// be halves; with tiles of 4×4, their rounding would add up to ten times as much.
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

// threads: the most threads that can work on it.
void winograd_convolve(const Convolution& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
