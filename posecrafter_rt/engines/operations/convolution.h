// 3×3 convolutions in 16 or eight bits. Layer 4: knows neither Python nor any library's tensors or threads.
#pragma once

#include "parallel.h"
#include "pictures.h"

namespace posecrafter {

// out (frames, planes, out_height, out_width), compact, = the convolution of a picture by weights that
// `pack_windows` packed, plus bias (out_channels) and where it is given a residual, as out. Out channels are a multiple
// of a panel's; the first `planes` of them are written.
struct WindowConvolution {
    Picture picture;
    Window window;
    const float *packed, *bias, *residual;
    float* out;
    int out_channels, planes;
};

// Format: Words, Digits or Bytes. threads: how many work at it at best.
template <class Format>
void convolve_windows(const WindowConvolution& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
