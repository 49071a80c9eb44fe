// Convolves a few frames at a time, each thread its own, so that what is read twice stays in its cache. Layer 4.
#include "convolution.h"

#include "linear.h"

namespace posecrafter {

namespace {

constexpr int kLeastRows = 168, kLeastTileRows = 1024;  // the fewest rows for which it pays to read all weights

// Convolves `frames` frames from `first` on.
template <class Format>
void convolve_frames(const WindowConvolution& call, int first, int frames, int threads, const Parallel& parallel) {
    const size_t plane = static_cast<size_t>(call.picture.height) * call.picture.width;
    const size_t out_plane = static_cast<size_t>(call.window.out_height) * call.window.out_width;
    Picture picture = call.picture;
    picture.input += first * picture.channels * plane;
    picture.frames = frames;
    const PictureOf<Format> windows(picture, call.window, parallel);
    const size_t at = first * call.planes * out_plane;
    Linear linear{};
    linear.windows = &windows;
    linear.layer = {call.packed, call.bias,
                    window_side(call.window.times) * window_side(call.window.times) * Format::depth(picture.channels),
                    call.out_channels};
    linear.residual = call.residual == nullptr ? nullptr : call.residual + at;
    linear.out = call.out + at;
    linear.frames = frames, linear.size = static_cast<int>(out_plane);
    linear.to_planes = true, linear.planes = call.planes;
    posecrafter::linear<Format>(linear, threads, parallel);
}

}  // namespace

template <class Format>
void convolve_windows(const WindowConvolution& call, int threads, const Parallel& parallel) {
    const int frames = call.picture.frames, size = call.window.out_height * call.window.out_width;
    if (frames == 0 || size == 0) return;
    const bool is_even = frames % threads == 0 || frames >= 4 * threads;  // or nearly so, between threads
    int parts = frames / ceil_div(Format::is_tiled() ? kLeastTileRows : kLeastRows, size);
    parts -= parts % threads;
    if (parts == 0 || !is_even) return convolve_frames<Format>(call, 0, frames, threads, parallel);
    parallel(parts, [&](int part) {
        const int first = frames * part / parts, last = frames * (part + 1) / parts;
        convolve_frames<Format>(call, first, last - first, 1, alone);
    });
}

#ifdef PC_HAS_VNNI
template void convolve_windows<Bytes>(const WindowConvolution&, int, const Parallel&);
template void convolve_windows<Words>(const WindowConvolution&, int, const Parallel&);
#endif
#ifdef PC_HAS_TILES
template void convolve_windows<Digits>(const WindowConvolution&, int, const Parallel&);
#endif

}  // namespace posecrafter
