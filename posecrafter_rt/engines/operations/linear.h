// Linear maps of tokens on x86-64, in float32, perhaps of weights in 16 bits, in 16 bits or in eight, read from
// pictures whose channels come first, or their windows, or written to them without a copy apart, gated, added to a
// residual, of tokens after a LayerNorm. Layer 4: knows neither Python nor any library's tensors or threads.
#pragma once

#include <vector>

#include "group_norm.h"
#include "parallel.h"

namespace posecrafter {

// weight (out, in) → packed (out / panel, in, panel), as floats or halves; `packed` is 64 bytes aligned.
template <class Number>
void linear_pack(const float* weight, int in_channels, int out_channels, Number* packed, const Parallel& parallel);

class Windows;

// A map from in_channels to out_channels, x · weightᵀ + bias. The weight of a gated one has 2 · out_channels rows, a
// value's and then a gate's; it is value · GELU(gate). out_channels are a multiple of a panel's.
struct Layer {
    const void* packed;
    const float* bias;
    int in_channels, out_channels;
};

// LayerNorm over the channels of each token, weight and bias (channels); without a weight there is none.
struct LayerNorm {
    const float *weight, *bias;
    double eps;
};

// Tokens of some of the output's channels, a multiple of a panel's.
struct Part {
    float* out;
    int channels;
};

// out = the layer's output, or that of the next one after a gated layer (without `packed`: there is none), plus the
// residual where there is one. Input channels that come first are a multiple of a vector's floats. All are compact:
// tokens (frames, size, channels), planes (frames, channels, size), the residual as out.
struct Linear {
    const float* input;
    LayerNorm norm;          // of tokens, before the layer
    PlaneScales scales;      // of planes
    const Windows* windows;  // that are the tokens, in place of an input: a PictureOf<Format>, for that format
    Layer layer, next;
    const float* residual;
    float* out;
    std::vector<Part> parts;  // in place of tokens in `out`, in the order of their channels; then there is no residual
    int frames, size;
    bool from_planes, to_planes, is_gated;
    int planes;  // that are written to planes, where not 0: the first of the layer's output channels
};

// Format: float or Half, of weights that `linear_pack` packed, which floats are multiplied by in float32; or Words,
// Digits or Bytes, in which both are multiplied, packed by its `pack`. Every token has a scale of its own then: in
// bytes it is rounded to the 255th part of what lies between its least number and its most, and input channels are a
// multiple of four. threads: how many work at it at best.
template <class Format>
void linear(const Linear& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
