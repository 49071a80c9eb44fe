// affine_warp_paste on the CPU: OpenMP threads share the frames, vector lanes the pixels of a row.
// Layer 2: the arithmetic is in affine_warp_paste.h; here are the loops and the choice of instruction set.
#include "affine_warp_paste.h"

#include <algorithm>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(POSECRAFTER_PORTABLE)
#define PC_X86 1
#endif

namespace posecrafter {
namespace {

constexpr int kChunk = 256;  // pixels located at once: 7 KiB of taps, in L1

// Taps of a run of pixels, one array per field, so that the compiler fills and reads them with vectors.
struct TapRun {
    int offset[kChunk], right[kChunk], down[kChunk];
    float w00[kChunk], w01[kChunk], w10[kChunk], w11[kChunk];
};

template <Mode mode>
PC_HD void locate_run(const Region& region, int x, int y, int count, int height, int width, TapRun* run) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        float source_x, source_y;
        source_position(region.inverse, x + i, y, &source_x, &source_y);
        const Taps taps = locate<mode>(source_x, source_y, height, width);
        run->offset[i] = taps.offset;
        run->right[i] = taps.right;
        run->down[i] = taps.down;
        run->w00[i] = taps.w00;
        run->w01[i] = taps.w01;
        run->w10[i] = taps.w10;
        run->w11[i] = taps.w11;
    }
}

template <Mode mode, typename T>
PC_HD void blend_run(const float* plane, const TapRun& run, int count, T* out) {
#pragma omp simd
    for (int i = 0; i < count; ++i) {
        const Taps taps{run.offset[i], run.right[i], run.down[i], run.w00[i], run.w01[i], run.w10[i], run.w11[i]};
        from_float(blend<mode>(plane, taps), out + i);
    }
}

// The pixels of a row whose samples lie inside are one interval: each coordinate is monotone in x, rounding included.
PC_HD void inside_interval(const Region& region, int y, int height, int width, int* first, int* last) {
    const auto inside = [&](int x) {
        float source_x, source_y;
        source_position(region.inverse, x, y, &source_x, &source_y);
        return is_inside(source_x, source_y, height, width);
    };
    while (*first < *last && !inside(*first)) ++*first;
    while (*last > *first && !inside(*last - 1)) --*last;
}

template <Mode mode, typename T>
PC_HD void paste_region(const Params& p, const Region& region, const float* source, T* frame) {
    const int64_t plane = static_cast<int64_t>(p.height) * p.width;
    TapRun run;
    for (int y = region.y0; y < region.y1; ++y) {
        int first = region.x0, last = region.x1;
        inside_interval(region, y, p.height, p.width, &first, &last);
        for (int x = first; x < last; x += kChunk) {
            const int count = std::min(kChunk, last - x);
            locate_run<mode>(region, x, y, count, p.height, p.width, &run);
            T* row = frame + static_cast<int64_t>(y) * p.width + x;
            for (int c = 0; c < p.channels; ++c) blend_run<mode>(source + c * plane, run, count, row + c * plane);
        }
    }
}

template <typename T>
PC_HD void paste_by_mode(const Params& p, const Region& region, const float* source, T* frame) {
    if (p.mode == Mode::bilinear) paste_region<Mode::bilinear>(p, region, source, frame);
    if (p.mode == Mode::nearest) paste_region<Mode::nearest>(p, region, source, frame);
    if (p.mode == Mode::unit_variance) paste_region<Mode::unit_variance>(p, region, source, frame);
}

template <typename T>
using Paste = void (*)(const Params&, const Region&, const float*, T*);

template <typename T>
void paste_baseline(const Params& p, const Region& region, const float* source, T* frame) {
    paste_by_mode(p, region, source, frame);
}

#ifdef PC_X86
template <typename T>
__attribute__((target("avx2"))) void paste_avx2(const Params& p, const Region& region, const float* source, T* frame) {
    paste_by_mode(p, region, source, frame);
}

template <typename T>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) void paste_avx512(const Params& p, const Region& region,
                                                                                const float* source, T* frame) {
    paste_by_mode(p, region, source, frame);
}
#endif

template <typename T>
Paste<T> choose_paste() {
#ifdef PC_X86
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return paste_avx512<T>;
    if (__builtin_cpu_supports("avx2")) return paste_avx2<T>;
#endif
    return paste_baseline<T>;
}

// Converts the source to float planes, so that 16-bit latents are converted once and not for every tap.
template <typename T>
void widen(const T* source, int64_t count, std::vector<float>* planes) {
    planes->resize(count);
    for (int64_t i = 0; i < count; ++i) (*planes)[i] = to_float(source[i]);
}

template <typename T>
void edit_frame(const Params& p, int index, const float* shared, std::vector<float>* scratch, Paste<T> paste) {
    const int64_t size = static_cast<int64_t>(p.channels) * p.height * p.width;
    const T* source = static_cast<const T*>(p.source) + index * p.source_stride;
    T* frame = static_cast<T*>(p.out) + index * size;
    const float* planes = shared;
    for (int r = 0; index >= p.lead && r < p.regions; ++r) {
        const int64_t edit = static_cast<int64_t>(index - p.lead) * p.regions + r;
        const Region region = prepare_region(p.affines + edit * 6, p.rects + edit * 4, p.height, p.width);
        if (region.x0 >= region.x1 || region.y0 >= region.y1) continue;
        if (planes == nullptr) {  // the frame's own latent, read before any of it is overwritten
            widen(source, size, scratch);
            planes = scratch->data();
        }
        paste(p, region, planes, frame);
    }
}

template <typename T>
void run(const Params& p, int threads) {
    const int64_t size = static_cast<int64_t>(p.channels) * p.height * p.width;
    const Paste<T> paste = choose_paste<T>();
    const bool is_shared = p.source_stride == 0 && p.regions > 0 && p.frames > p.lead;
    std::vector<float> shared;
    if (is_shared) widen(static_cast<const T*>(p.source), size, &shared);
    bool is_out_of_memory = false;
#pragma omp parallel num_threads(threads) if (threads > 1 && p.frames > 1)
    {
        std::vector<float> scratch;
#pragma omp for schedule(static)
        for (int index = 0; index < p.frames; ++index) {
            const T* source = static_cast<const T*>(p.source) + index * p.source_stride;
            T* frame = static_cast<T*>(p.out) + index * size;
            if (p.copy) std::memcpy(frame, source, size * sizeof(T));  // the paste below finds these lines in cache
            try {
                edit_frame(p, index, is_shared ? shared.data() : nullptr, &scratch, paste);
            } catch (const std::bad_alloc&) {  // no exception may leave the parallel region
#pragma omp atomic write
                is_out_of_memory = true;
            }
        }
    }
    if (is_out_of_memory) throw std::bad_alloc();
}

}  // namespace

void affine_warp_paste_cpu(const Params& params, int threads) {
    if (params.dtype == DType::fp32) run<float>(params, threads);
    if (params.dtype == DType::fp16) run<Half>(params, threads);
    if (params.dtype == DType::bf16) run<BFloat16>(params, threads);
}

}  // namespace posecrafter
