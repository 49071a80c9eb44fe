// Pictures in 16 or eight bits, for convolutions: channels last, surrounded by a border of zeros. Layer 4: knows
// neither Python nor any library's tensors or threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "byte_format.h"
#include "digit_format.h"
#include "linear.h"
#include "parallel.h"
#include "word_format.h"

namespace posecrafter {

// A convolution's input (frames, channels, height, width), compact; channels are a multiple of a vector's floats. If
// weight and bias (channels) are given, it is SiLU(GroupNorm(input)), or with groups 0 SiLU(input · weight + bias).
struct Picture {
    const float* input;
    const float *weight, *bias;
    int frames, channels, height, width, groups;
    double eps;

    // Room for GroupNorm's scale of each channel of each frame, then the shifts; empty if there is no norm.
    std::vector<float> room_for_norms() const {
        return std::vector<float>(weight == nullptr ? 0 : size_t{2} * frames * channels);
    }
};

// The windows of a 3×3 convolution with padding 1. times 2: those of a transposed 4×4 convolution with stride 2, which
// doubles the picture. Then each output reads 2×2 pixels, and its row and column, even or odd, decide which weights.
// out_height and out_width: the size of the output.
struct Window {
    int stride, times, out_height, out_width;
};

constexpr int window_side(int times) { return times == 2 ? 2 : 3; }  // in pixels

// How many floats `pack_windows` writes.
template <class Format>
size_t packed_windows(int times, int in_channels, int out_channels);

// Packs weight (out, in, 3, 3) by the format's `pack`. For times 2 the weight is (in, out, 4, 4), a transposed
// convolution's with stride 2, and is packed for each of the four kinds of outputs.
template <class Format>
void pack_windows(const float* weight, int in_channels, int out_channels, int times, float* packed,
                  const Parallel& parallel);

// The part of a picture's windows that does not depend on the format.
class Windows {
public:
    // Outputs in one row of a frame.
    int columns() const { return window_.out_width; }

    // Pixels of a window.
    int taps() const { return window_side(window_.times) * window_side(window_.times); }

protected:
    Windows(const Picture& picture, Window window, int depth)
        : window_(window), depth_(depth), height_(picture.height), width_(picture.width) {}

    Window window_;
    int depth_, height_, width_;  // depth: numbers from one pixel to the next
};

// How the numbers of frames are written: each frame has one scale, in which zero is exact. A number is scale · (integer
// - zero).
class ScaledFrames {
protected:
    // Sets the scales and returns the norms, see `Picture`. least, most: the range of the integers.
    std::vector<float> prepare(const Picture& picture, int least, int most, const Parallel& parallel);

    float inverse(int frame) const { return scales_[frame] > 0 ? 1 / scales_[frame] : 0; }
    template <class Number>
    ScaledRows<Number> rows(int frame, const Number* first, size_t stride, int depth, int segments,
                            size_t pitch) const {
        return {first, stride, depth, segments, pitch, &scales_[frame], &lows_[frame], 0};
    }

    std::vector<float> scales_, zeros_, lows_;

private:
    void set_scales(const std::vector<Range>& ranges, int frames, int least, int most);
};

// Frames of integers, as store_whole stores them.
template <class Number, int kLeast, int kMost>
class WholeFrames : ScaledFrames {
public:
    static constexpr int kPlanes = 1;

    // plane, which only DigitFrames needs: the numbers of all pixels of all frames, borders included.
    std::vector<float> prepare(const Picture& picture, size_t, const Parallel& parallel) {
        return ScaledFrames::prepare(picture, kLeast, kMost, parallel);
    }
    auto writer(int frame) const {
        return [inverse = inverse(frame), zero = zeros_[frame]](Number* to, Vector v) {
            store_whole(to, v, inverse, zero);
        };
    }
    void fill(int frame, Number* to, size_t count) const { std::fill_n(to, count, static_cast<Number>(zeros_[frame])); }
    using ScaledFrames::rows;
};

#ifdef PC_HAS_TILES
// Frames of digits: a plane of high digits, then one of low digits.
class DigitFrames : ScaledFrames {
public:
    static constexpr int kPlanes = 2;

    std::vector<float> prepare(const Picture& picture, size_t plane, const Parallel& parallel) {
        plane_ = plane;
        return ScaledFrames::prepare(picture, 0, kMostDigits, parallel);
    }
    auto writer(int frame) const {
        return [inverse = inverse(frame), zero = zeros_[frame], plane = plane_](uint8_t* to, Vector v) {
            store_digits(to, plane, v, inverse, zero);
        };
    }
    void fill(int frame, uint8_t* to, size_t count) const {
        const int zero = static_cast<int>(zeros_[frame]);
        std::fill_n(to, count, static_cast<uint8_t>((zero + kDigit / 2) / kDigit));
        std::fill_n(to + plane_, count, static_cast<uint8_t>(zero % kDigit));
    }
    DigitRows rows(int frame, const uint8_t* first, size_t stride, int depth, int segments, size_t pitch) const {
        return {ScaledFrames::rows(frame, first, stride, depth, segments, pitch), plane_};
    }

private:
    size_t plane_ = 0;
};
#endif

template <class Format>
struct FramesOf;
template <>
struct FramesOf<Bytes> : WholeFrames<uint8_t, 0, 255> {};
#ifdef PC_HAS_VNNI
template <>
struct FramesOf<Words> : WholeFrames<int16_t, -kMostNumber, kMostNumber> {};
#endif
#ifdef PC_HAS_TILES
template <>
struct FramesOf<Digits> : DigitFrames {};
#endif

template <class Format>
class PictureOf : public Windows {
    using Number = typename Format::Number;

public:
    PictureOf(const Picture& picture, Window window, const Parallel& parallel);

    // Computes a panel's sums over windows, for outputs in whole rows from `first` on, counted over all frames.
    void sum(int64_t first, int count, const Layer& layer, int panel, float* sums, const Fetch& next) const;

private:
    void fill_row(const Picture& picture, const float* norms, int frame, int y);
    void sum_windows(int64_t first, int count, const float* weights, size_t kind, float* sums,
                     const Fetch& next) const;  // of Bytes and Words, by VNNI
    void sum_rows(int64_t first, int count, const float* weights, float* sums,
                  const Fetch& next) const;  // by tiles, with a stride
    void sum_runs(int64_t first, int count, const float* weights, size_t kind, float* sums,
                  const Fetch& next) const;  // by tiles
    typename Format::Numbers windows(int frame, int top, int left) const;
    Number* pixel(int frame, int y, int x) const;

    FramesOf<Format> frames_;
    Number* pixels_;
};

}  // namespace posecrafter
