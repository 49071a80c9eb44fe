// affine_warp_paste on CUDA: a thread owns 16 bytes of a row and writes them once, in every channel.
// Layer 2: the arithmetic is in affine_warp_paste.h; here are the launch, the vector stores and the region table.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "affine_warp_paste.h"

namespace posecrafter {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;  // of a frame: the most along a grid's y

template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
    T item[kVector];
};

// Where a pixel samples; `region` is negative if the pixel keeps its own value.
struct Edit {
    float source_x, source_y;
    int region;
};

__device__ __forceinline__ Edit find_edit(const Region* regions, int count, int x, int y, int height, int width) {
    Edit edit{0.0f, 0.0f, -1};
    for (int r = count - 1; r >= 0; --r) {  // the last region wins: search from it, so that only one sample is read
        if (!covers(regions[r], x, y)) continue;
        source_position(regions[r].inverse, x, y, &edit.source_x, &edit.source_y);
        if (is_inside(edit.source_x, edit.source_y, height, width)) {
            edit.region = r;
            return edit;
        }
    }
    return edit;
}

template <Mode mode, typename T, int kVector>
__global__ void __launch_bounds__(kThreads) affine_warp_paste_kernel(const Params p) {
    extern __shared__ Region regions[];
    const int index = blockIdx.x;
    const int count = index >= p.lead ? p.regions : 0;
    for (int r = threadIdx.x; r < count; r += kThreads) {
        const int64_t edit = static_cast<int64_t>(index - p.lead) * p.regions + r;
        regions[r] = prepare_region(p.affines + edit * 6, p.rects + edit * 4, p.height, p.width);
    }
    __syncthreads();

    const int plane = p.height * p.width;
    const int64_t pixel = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVector;
    if (pixel >= plane) return;
    const int y = static_cast<int>(pixel / p.width), x = static_cast<int>(pixel % p.width);
    Edit edits[kVector];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        edits[i] = find_edit(regions, count, x + i, y, p.height, p.width);
        any |= edits[i].region >= 0;
    }
    if (!any && !p.copy) return;

    const T* source = static_cast<const T*>(p.source) + index * p.source_stride;
    T* out = static_cast<T*>(p.out) + static_cast<int64_t>(index) * p.channels * plane;
    for (int c = 0; c < p.channels; ++c, source += plane, out += plane) {
        Pack<T, kVector> pack = *reinterpret_cast<const Pack<T, kVector>*>(source + pixel);
        if (any) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
                if (edits[i].region < 0) continue;
                const Taps taps = locate<mode>(edits[i].source_x, edits[i].source_y, p.height, p.width);
                from_float(blend<mode>(source, taps), &pack.item[i]);
            }
        }
        *reinterpret_cast<Pack<T, kVector>*>(out + pixel) = pack;
    }
}

// A thread's pixels: those in 16 bytes, or one where rows or addresses are not aligned to that.
int pixels_per_thread(const Params& p) {
    const int vector = p.dtype == DType::fp32 ? 4 : 8;
    const bool is_aligned = p.width % vector == 0 && reinterpret_cast<uintptr_t>(p.source) % 16 == 0 &&
                            reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    return is_aligned ? vector : 1;
}

void check_pixels(const Params& p) {
    const int64_t pixels = static_cast<int64_t>(p.height) * p.width;
    const int64_t most = kMaxBlocks * kThreads * pixels_per_thread(p);
    if (pixels > most)
        throw std::invalid_argument("height × width = " + std::to_string(pixels) + " exceeds " + std::to_string(most) +
                                    ", the most on CUDA");
}

template <Mode mode, typename T, int kVector>
void launch(const Params& p, cudaStream_t stream) {
    const int64_t vectors = static_cast<int64_t>(p.height) * p.width / kVector;
    const dim3 grid(p.frames, static_cast<unsigned>((vectors + kThreads - 1) / kThreads));
    affine_warp_paste_kernel<mode, T, kVector><<<grid, kThreads, p.regions * sizeof(Region), stream>>>(p);
}

template <Mode mode, typename T>
void launch_by_alignment(const Params& p, cudaStream_t stream) {
    constexpr int kVector = 16 / sizeof(T);
    pixels_per_thread(p) == kVector ? launch<mode, T, kVector>(p, stream) : launch<mode, T, 1>(p, stream);
}

template <typename T>
void launch_by_mode(const Params& p, cudaStream_t stream) {
    if (p.mode == Mode::bilinear) launch_by_alignment<Mode::bilinear, T>(p, stream);
    if (p.mode == Mode::nearest) launch_by_alignment<Mode::nearest, T>(p, stream);
    if (p.mode == Mode::unit_variance) launch_by_alignment<Mode::unit_variance, T>(p, stream);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* affine_warp_paste_cuda(const Params& params, int device, void* stream) {
    check_pixels(params);
    int previous = device;
    cudaError_t error = cudaGetDevice(&previous);
    if (error == cudaSuccess && previous != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return message(error);
    const auto on = static_cast<cudaStream_t>(stream);
    if (params.dtype == DType::fp32) launch_by_mode<float>(params, on);
    if (params.dtype == DType::fp16) launch_by_mode<Half>(params, on);
    if (params.dtype == DType::bf16) launch_by_mode<BFloat16>(params, on);
    error = cudaGetLastError();
    if (previous != device) cudaSetDevice(previous);
    return message(error);
}

const char* cuda_device_error() {
    int count = 0;
    const char* error = message(cudaGetDeviceCount(&count));
    return error != nullptr || count > 0 ? error : "no CUDA device";
}

}  // namespace posecrafter
