// 3×3 convolutions of stride 1 and padding 1 in float32 on x86-64, by Winograd's minimal filtering F(4×4, 3×3): 36
// products for a tile of 4×4 outputs in place of 144. Exact but for rounding. Layer 4: knows neither Python nor any
// library's tensors or threads. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015).
#pragma once

#include <cstddef>
#include <functional>

namespace posecrafter {

constexpr int kLanes = 8;   // channels of a vector: input channels are a multiple of it
constexpr int kPanel = 16;  // output channels of the innermost loop: output channels are a multiple of it
constexpr int kProducts = 36;

// Calls task(i) for every i in 0 … count-1 on whatever threads there are, and returns when all are done.
using Parallel = std::function<void(int count, const std::function<void(int)>& task)>;

// Whether this processor, and this build, can run it: AVX2 and FMA.
bool has_winograd();

// weight (out, in, 3, 3) → packed, 36 · in · out floats (36, out / 16, in, 16); `packed` is 64 bytes aligned.
void winograd_pack(const float* weight, int in_channels, int out_channels, float* packed, const Parallel& parallel);

// One convolution. All are compact: input (frames, in, h / times, w / times), out (frames, out, h, w), bias (out). It
// is of the input with each pixel repeated `times`, 1 or 2, in either direction, and where scale and shift (frames, in)
// are given of SiLU(input · scale + shift).
struct Convolution {
    const float* input;
    const float* scale;
    const float* shift;
    const float* packed;
    const float* bias;
    float* out;
    int frames, in_channels, out_channels, height, width, times;
};

// GroupNorm of an input as scale and shift. input (frames, channels, size); weight and bias (channels).
struct GroupNorm {
    const float* input;
    const float* weight;
    const float* bias;
    float* scale;
    float* shift;
    int frames, channels, groups;
    size_t size;
    double eps;
};

void group_norm_scales(const GroupNorm& norm, const Parallel& parallel);

void winograd_convolve(const Convolution& call, const Parallel& parallel);

}  // namespace posecrafter
