// Pictures in eight bits, for convolutions: channels last, a border of zeros around. Layer 4: knows neither Python nor
// any library's tensors or threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.h"
#include "linear.h"
#include "parallel.h"

namespace posecrafter {

// The input of a convolution (frames, channels, height, width), compact; channels are a multiple of a vector's floats.
// Where weight and bias (channels) are given it is SiLU(GroupNorm(input)).
struct Picture {
    const float* input;
    const float *weight, *bias;
    int frames, channels, height, width, groups;
    double eps;
};

// Which windows of a picture a 3×3 convolution with a padding of 1 is of. times 2: of the picture with each pixel
// doubled in either direction. Then an output is of 2×2 pixels, and by which weights its row and column tell, being
// even or odd. out_height and out_width: how many outputs there are.
struct Window {
    int stride, times, out_height, out_width;
};

constexpr int window_side(int times) { return times == 2 ? 2 : 3; }  // in pixels

// How many floats `pack_windows` writes.
size_t packed_windows(int times, int in_channels, int out_channels);

// weight (out, in, 3, 3) → packed for each kind of output as by `pack_bytes`.
void pack_windows(const float* weight, int in_channels, int out_channels, int times, float* packed,
                  const Parallel& parallel);

// A picture with one scale for each frame, in which zero is exact.
class BytePicture {
public:
    BytePicture(const Picture& picture, Window window, const Parallel& parallel);

    // Outputs in one row of a frame.
    int columns() const { return window_.out_width; }

    // Sums over windows of a panel of the weights, of outputs in whole rows from `first` on, counted over all frames.
    void sum(int64_t first, int count, const Layer& layer, int panel, float* sums, const Fetch& next) const;

private:
    void set_scales(const std::vector<Range>& ranges, int frames);
    void fill_row(const Picture& picture, const float* norms, int frame, int y);
    ByteRows windows(int frame, int top, int left) const;
    uint8_t* pixel(int frame, int y, int x) const;

    Window window_;
    int channels_, height_, width_;
    uint8_t* pixels_;
    std::vector<float> scales_, zeros_, lows_;  // of each frame: a number is scale · (byte - zero), low + scale · byte
};

}  // namespace posecrafter
