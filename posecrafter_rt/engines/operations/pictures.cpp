// Converts pictures to windows in fewer bits: one reading for the norm and the range, one to convert. Layer 4.
#include "pictures.h"

#include <algorithm>
#include <cmath>

#include "memory.h"

namespace posecrafter {

namespace {

constexpr int kBorder = 1;                 // of zeros around a picture
constexpr float kLeastSilu = -0.2784646f;  // the least SiLU, at -1.2784645

thread_local Scratch thread_pixels;  // of the thread that calls an operation

// Sums of x - centre and of its square.
struct Moments {
    double sum = 0, squares = 0;
};

Range joined(Range a, Range b) { return {std::min(a.low, b.low), std::max(a.high, b.high)}; }

// Adds a channel's numbers and returns their range. Sums are in float over a stretch, in double over stretches.
Range add(const float* x, size_t count, float centre, Moments& all) {
    constexpr size_t kStretch = 4096;
    const Vector first = Vector{} + x[0];
    Vector low = first, high = first;
    Range range{x[0], x[0]};
    for (size_t begin = 0; begin < count; begin += kStretch) {
        const size_t end = std::min(count, begin + kStretch);
        Vector sums[2] = {}, squares[2] = {};
        size_t i = begin;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes)
#pragma GCC unroll 2
            for (int part = 0; part < 2; ++part) {
                const Vector v = load(x + i + part * kLanes), d = v - centre;
                sums[part] += d;
                squares[part] += d * d;
                low = v < low ? v : low;
                high = v > high ? v : high;
            }
        all.sum += total(sums[0] + sums[1]);
        all.squares += total(squares[0] + squares[1]);
        for (; i < end; ++i) {
            const float d = x[i] - centre;
            all.sum += d, all.squares += d * d;
            range = joined(range, {x[i], x[i]});
        }
    }
    return joined(range, {least(low), most(high)});
}

float silu_of(float x) { return x / (1 + std::exp(-x)); }

// The range of SiLU over a range of numbers.
Range silu_of(Range range) {
    const float low = silu_of(range.low), high = silu_of(range.high);
    return {range.low < -1.2784645f && range.high > -1.2784645f ? kLeastSilu : std::min(low, high),
            std::max(low, high)};
}

// Computes the GroupNorm of one group of a frame as a scale and a shift for each channel. Returns the range of SiLU of
// the result, NaN if a number is not finite. groups: one per channel if the picture has none.
Range norm_group(const Picture& p, int groups, int index, float* scales, float* shifts) {
    const int width = p.channels / groups, first = index % groups * width;
    const size_t plane = static_cast<size_t>(p.height) * p.width, count = width * plane;
    const float* x = p.input + index * count;
    Moments all;
    std::vector<Range> ranges(width);
    for (int c = 0; c < width; ++c) ranges[c] = add(x + c * plane, plane, x[0], all);
    double mean = all.sum / count;
    const double variance = std::max(0.0, all.squares / count - mean * mean);
    double deviation = std::sqrt(variance + p.eps);
    mean += x[0];
    if (p.groups == 0) mean = 0, deviation = 1;
    Range range{0, 0};
    for (int c = 0; c < width; ++c) {
        const float scale = static_cast<float>(p.weight[first + c] / deviation);
        const float shift = static_cast<float>(p.bias[first + c] - mean * scale);
        scales[index * width + c] = scale, shifts[index * width + c] = shift;
        const float a = ranges[c].low * scale + shift, b = ranges[c].high * scale + shift;
        range = joined(range, silu_of(Range{std::min(a, b), std::max(a, b)}));
    }
    const float none = static_cast<float>(0 * (all.sum + all.squares));
    return {range.low + none, range.high + none};
}

// Floats of the packed weights of one kind of output; a doubled picture has four kinds.
template <class Format>
size_t one_kind(int times, int depth, int out_channels) {
    return out_channels / kPanel * Format::panel(window_side(times) * window_side(times) * depth);
}

}  // namespace

std::vector<float> ScaledFrames::prepare(const Picture& p, int least, int most, const Parallel& parallel) {
    std::vector<float> norms = p.room_for_norms();
    const int groups = p.groups > 0 ? p.groups : p.channels, parts = norms.empty() ? p.channels / kLanes : groups;
    const size_t all = norms.size() / 2, plane = static_cast<size_t>(p.height) * p.width;
    std::vector<Range> ranges(static_cast<size_t>(p.frames) * parts);
    parallel(p.frames * parts, [&](int index) {
        if (norms.empty())
            ranges[index] = range_of(p.input + index * kLanes * plane, static_cast<int>(kLanes * plane));
        else
            ranges[index] = norm_group(p, groups, index, norms.data(), norms.data() + all);
    });
    set_scales(ranges, p.frames, least, most);
    return norms;
}

void ScaledFrames::set_scales(const std::vector<Range>& ranges, int frames, int least, int most) {
    const size_t parts = ranges.size() / frames;
    for (int frame = 0; frame < frames; ++frame) {
        Range range{0, 0};
        float none = 0;
        for (size_t part = 0; part < parts; ++part) {
            const Range own = ranges[frame * parts + part];
            range = joined(range, own);
            none += 0 * (own.low + own.high);
        }
        const float scale = (range.high - range.low) / static_cast<float>(most - least) + none;
        zeros_.push_back(scale > 0 ? std::round(-range.low / scale) + static_cast<float>(least) : 0);
        scales_.push_back(scale);
        lows_.push_back(-zeros_.back() * scale);
    }
}

template <class Format>
PictureOf<Format>::PictureOf(const Picture& p, Window window, const Parallel& parallel)
    : Windows(p, window, Format::depth(p.channels)) {
    const size_t rows = static_cast<size_t>(p.frames) * (height_ + 2 * kBorder);
    const size_t plane = rows * (width_ + 2 * kBorder) * depth_;
    const std::vector<float> norms = frames_.prepare(p, plane, parallel);
    const size_t bytes = FramesOf<Format>::kPlanes * plane * sizeof(Number);
    pixels_ = reinterpret_cast<Number*>(thread_pixels.take(bytes / sizeof(float) + 1));
    parallel(static_cast<int>(rows), [&](int row) {
        fill_row(p, norms.empty() ? nullptr : norms.data(), row / (height_ + 2 * kBorder),
                 row % (height_ + 2 * kBorder) - kBorder);
    });
}

template <class Format>
void PictureOf<Format>::fill_row(const Picture& p, const float* norms, int frame, int y) {
    const size_t channels = p.channels, depth = depth_, line = width_ * depth;
    const auto write = frames_.writer(frame);
    Number* row = pixel(frame, y, -kBorder);
    if (y < 0 || y >= height_) {
        frames_.fill(frame, row, line + 2 * kBorder * depth);
        return;
    }
    frames_.fill(frame, row, kBorder * depth);
    row += kBorder * depth;
    frames_.fill(frame, row + line, kBorder * depth);
    const size_t plane = static_cast<size_t>(height_) * width_, all = p.frames * channels;
    for (size_t channel = 0; channel < channels; channel += kLanes) {
        const size_t at = frame * channels + channel;
        const float* from = p.input + at * plane + static_cast<size_t>(y) * width_;
        Vector scale{}, shift{};
        if (norms != nullptr) scale = load(norms + at), shift = load(norms + all + at);
        for (int x = 0; x < width_; x += kColumns) {
            const int count = std::min(kColumns, width_ - x);
            Vector v[kColumns];
            read_columns(from + x, plane, count, v);
            for (int i = 0; i < count; ++i)
                write(row + (x + i) * depth + channel, norms != nullptr ? silu(v[i] * scale + shift) : v[i]);
        }
    }
}

template <class Format>
typename Format::Number* PictureOf<Format>::pixel(int frame, int y, int x) const {
    const size_t rows = height_ + 2 * kBorder, columns = width_ + 2 * kBorder;
    return pixels_ + ((frame * rows + y + kBorder) * columns + x + kBorder) * depth_;
}

template <class Format>
typename Format::Numbers PictureOf<Format>::windows(int frame, int top, int left) const {
    const size_t depth = depth_, pitch = (width_ + 2 * kBorder) * depth;
    const int side = window_side(window_.times);
    return frames_.rows(frame, pixel(frame, top, left), window_.stride * depth, side * depth_, side, pitch);
}

#ifdef PC_HAS_VNNI
// Multiplies the windows of all rows together, because a row may be short. In a doubled picture, even and odd rows and
// columns have weights of their own.
template <class Format>
void PictureOf<Format>::sum_windows(int64_t first, int count, const float* weights, size_t kind, float* sums,
                                    const Fetch& next) const {
    const int columns = window_.out_width, times = window_.times;
    Row<Number>* list = room_for_list<Number>(count);
    for (int side = 0; side < times * times; ++side) {
        int listed = 0;
        for (int done = 0; done < count; done += columns) {
            const int64_t row = (first + done) / columns;
            const int frame = static_cast<int>(row / window_.out_height),
                      y = static_cast<int>(row % window_.out_height);
            if (times == 2 && y % 2 != side / 2) continue;
            const int top = times == 2 ? y / 2 - 1 + y % 2 : y * window_.stride - kBorder;
            const auto own = windows(frame, top, side % 2 - kBorder);
            float* to = sums + size_t(done) * kPanel;
            for (int x = side % 2, i = 0; x < columns; x += times, ++i, ++listed)
                list[listed] = {own.first + i * own.stride, own.scale, own.low, to + x * kPanel};
        }
        const Fetch other = times == 1 ? next : Fetch::nothing(sums);  // outputs do not follow each other
        if (listed > 0) multiply_listed<Format>(list, listed, windows(0, 0, 0), weights + side * kind, other);
    }
}
#endif

#ifdef PC_HAS_TILES
// Windows follow each other at one distance through all rows of a frame. Between rows lie as many more as the borders
// are wide. These are computed too, because a tile has sixteen rows and a picture's row may be short.
template <class Format>
void PictureOf<Format>::sum_runs(int64_t first, int count, const float* weights, size_t kind, float* sums,
                                 const Fetch& next) const {
    const int columns = window_.out_width, times = window_.times, pitch = width_ + 2 * kBorder;
    for (int done = 0; done < count;) {
        const int64_t row = (first + done) / columns;
        const int frame = static_cast<int>(row / window_.out_height), y = static_cast<int>(row % window_.out_height);
        const int rows = std::min((count - done) / columns, window_.out_height - y);
        for (int below = 0; below < std::min(times, rows); ++below)
            for (int side = 0; side < times; ++side) {  // of a doubled picture: even and odd rows and columns
                const int at = y + below, top = times == 2 ? at / 2 - 1 + at % 2 : at - kBorder;
                const int own_rows = ceil_div(rows - below, times);
                const TileRun run{(own_rows - 1) * pitch + width_, width_, pitch, size_t(times) * columns * kPanel};
                const float* own = weights + (times == 2 ? at % 2 * 2 + side : 0) * kind;
                const Sums to{sums + (size_t(done) + below * columns + side) * kPanel, size_t(times) * kPanel};
                multiply_tiles(windows(frame, top, side - kBorder), run, own, to, next.from(done));
            }
        done += rows * columns;
    }
}

template <class Format>
void PictureOf<Format>::sum_rows(int64_t first, int count, const float* weights, float* sums, const Fetch& next) const {
    for (int done = 0; done < count; done += window_.out_width) {
        const int64_t row = (first + done) / window_.out_width;
        const int frame = static_cast<int>(row / window_.out_height);
        const int top = static_cast<int>(row % window_.out_height) * window_.stride - kBorder;
        Format::multiply(windows(frame, top, -kBorder), window_.out_width, weights,
                         {sums + size_t(done) * kPanel, kPanel}, next.from(done));
    }
}
#endif

template <class Format>
void PictureOf<Format>::sum(int64_t first, int count, const Layer& layer, int panel, float* sums,
                            const Fetch& next) const {
    const size_t kind = one_kind<Format>(window_.times, depth_, layer.out_channels);
    const float* weights = static_cast<const float*>(layer.packed) + panel * Format::panel(layer.in_channels);
    if constexpr (Format::kByTiles)
        if (Format::is_tiled())
            return window_.stride == 1 ? sum_runs(first, count, weights, kind, sums, next)
                                       : sum_rows(first, count, weights, sums, next);
    if constexpr (Format::kByVnni) sum_windows(first, count, weights, kind, sums, next);
}

template <class Format>
size_t packed_windows(int times, int in_channels, int out_channels) {
    return times * times * one_kind<Format>(times, Format::depth(in_channels), out_channels);
}

template <class Format>
void pack_windows(const float* weight, int in_channels, int out_channels, int times, float* packed,
                  const Parallel& parallel) {
    if (times == 1) return Format::pack(weight, in_channels, 9, out_channels, packed, parallel);
    const size_t maps = static_cast<size_t>(in_channels) * out_channels;
    std::vector<float> own(maps * 4);
    for (int kind = 0; kind < times * times; ++kind) {
        const int odd_row = kind / 2, odd_column = kind % 2;
        for (size_t map = 0; map < maps; ++map) {
            const float* taps = weight + (map % in_channels * out_channels + map / in_channels) * 16;
            for (int tap = 0; tap < 4; ++tap)  // each of the 2×2 pixels meets every other row and column
                own[map * 4 + tap] = taps[(3 - tap / 2 * 2 - odd_row) * 4 + 3 - tap % 2 * 2 - odd_column];
        }
        Format::pack(own.data(), in_channels, 4, out_channels,
                     packed + kind * one_kind<Format>(times, Format::depth(in_channels), out_channels), parallel);
    }
}

#define PC_FORMAT(Format)                                                                              \
    template PictureOf<Format>::PictureOf(const Picture&, Window, const Parallel&);                    \
    template void PictureOf<Format>::sum(int64_t, int, const Layer&, int, float*, const Fetch&) const; \
    template size_t packed_windows<Format>(int, int, int);                                             \
    template void pack_windows<Format>(const float*, int, int, int, float*, const Parallel&);
#ifdef PC_HAS_VNNI
PC_FORMAT(Bytes)
PC_FORMAT(Words)
#endif
#ifdef PC_HAS_TILES
PC_FORMAT(Digits)
#endif
#undef PC_FORMAT

}  // namespace posecrafter
