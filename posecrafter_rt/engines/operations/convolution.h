// 3×3 convolutions in 16 or eight bits. Layer 4: knows neither Python nor any library's tensors or threads.
#pragma once

#include "parallel.h"
#include "pictures.h"

namespace posecrafter {

// out (frames, planes, out_height, out_width), compact, = the convolution of a picture by weights from `pack_windows`,
// plus bias (out_channels) and, if given, a residual with out's shape. out_channels is a multiple of a panel; only the
// first `planes` channels are written.
struct WindowConvolution {
    Picture picture;
    Window window;
    const float *packed, *bias, *residual;
    float* out;
    int out_channels, planes;
};

// Format: Words, Digits or Bytes. threads: the most threads that can work on it.
template <class Format>
void convolve_windows(const WindowConvolution& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
