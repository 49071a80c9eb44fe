// Linear maps of tokens on x86-64: in float32 with weights in 32 or 16 bits, in 16 bits, or in eight. They read tokens
// (perhaps with a LayerNorm), pictures whose channels come first, or a picture's windows, and write tokens or such
// pictures, without copying a whole tensor. They may be gated and added to a residual. Layer 4: knows neither Python
// nor any library's tensors or threads.
#pragma once

#include <vector>

#include "group_norm.h"
#include "parallel.h"

namespace posecrafter {

// Packs weight (out, in) as (out / panel, in, panel), in floats or halves. `packed` is 64-byte aligned.
template <class Number>
void linear_pack(const float* weight, int in_channels, int out_channels, Number* packed, const Parallel& parallel);

class Windows;

// A map from in_channels to out_channels: x · weightᵀ + bias, or gated: value · GELU(gate). The weight of a gated map
// has 2 · out_channels rows, first the value's, then the gate's. out_channels is a multiple of a panel.
struct Layer {
    const void* packed;
    const float* bias;
    int in_channels, out_channels;
};

// LayerNorm over the channels of each token; weight and bias (channels). Without a weight there is no norm.
struct LayerNorm {
    const float *weight, *bias;
    double eps;
};

// A tensor of tokens for some of the output's channels, a multiple of a panel.
struct Part {
    float* out;
    int channels;
};

// out = the layer's output, or the next layer's after a gated one (if `next` has weights), plus the residual if given.
// If channels come first, their number is a multiple of a vector's floats. All are compact: tokens (frames, size,
// channels), planes (frames, channels, size), and the residual like out.
struct Linear {
    const float* input;
    LayerNorm norm;          // of tokens, before the layer
    PlaneScales scales;      // of planes, before the layer
    const Windows* windows;  // the tokens instead of `input`, a PictureOf<Format> of the same format
    Layer layer, next;
    const float* residual;
    float* out;
    std::vector<Part> parts;  // tokens are written here instead of to `out`, by channels; then there is no residual
    int frames, size;
    bool from_planes, to_planes, is_gated;
    int planes;  // if not 0: only the first so many output channels are written, to planes
};

// Format: float or Half, for weights from `linear_pack`, which multiply floats in float32; or Words, Digits or Bytes,
// in which both sides are multiplied, for weights from the format's `pack`. In these, every token has its own scale: in
// bytes it is rounded to 1/255 of the range between its least and its largest number, and in_channels is a multiple of
// four. threads: the most threads that can work on it.
template <class Format>
void linear(const Linear& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
