// GroupNorm of pictures as a scale and a shift for each channel of each frame, applied by whatever reads the picture.
// Layer 4: knows neither Python nor any library's tensors or threads.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace posecrafter {

// What planes are multiplied by, and what is then added, each (frames, channels); nullptr: nothing.
struct PlaneScales {
    const float *scale, *shift;
};

// GroupNorm of an input as scale and shift; with groups 0 they are the weight and bias themselves. input (frames,
// channels, size); weight and bias (channels); scale and shift (frames, channels).
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

}  // namespace posecrafter
