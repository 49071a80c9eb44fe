// The arithmetic of affine_warp_paste, shared by the CPU and the CUDA path: invert, locate, blend, store.
// Layer 2: no library headers beyond CUDA's number types, so that a plain host compiler can build and fuzz it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PC_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PC_HD inline __attribute__((always_inline))
#else
#define PC_HD inline
#endif

namespace posecrafter {

enum class Mode : int { bilinear = 0, nearest = 1, unit_variance = 2 };
enum class DType : int { fp32 = 0, fp16 = 1, bf16 = 2 };

// One call. Frames are consecutive (channels, height, width) planes; `source_stride` is in elements, 0 if all frames
// share one source. The first `lead` output frames are copies; frame lead + j takes the j-th edit. Without `copy` only
// edits are written.
struct Params {
    const void* source;
    void* out;
    const float* affines;  // (frames - lead, regions, 2, 3), reference → target
    const int64_t* rects;  // (frames - lead, regions, 4): x0, y0, x1, y1, half open
    int64_t source_stride;
    int frames, lead, regions, channels, height, width;
    Mode mode;
    DType dtype;
    bool copy;
};

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// A region ready to sample: the float32 inverse, and the rectangle clipped to the frame (empty if unusable).
struct Region {
    float inverse[6];
    int x0, y0, x1, y1;
};

// Where one target pixel reads: an element offset in a plane, steps to its neighbours, and their weights.
struct Taps {
    int offset, right, down;
    float w00, w01, w10, w11;
};

PC_HD uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

PC_HD float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

PC_HD float to_float(float value) { return value; }

PC_HD float to_float(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

PC_HD float to_float(Half value) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(value.bits));
#else
    const uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
    const float finite = bits_float(magnitude << 13) * 0x1p112f;  // exact, subnormals too: only the bias differs
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    return bits_float((magnitude >= 0x7c00u ? special : float_bits(finite)) | sign);
#endif
}

PC_HD void from_float(float value, float* out) { *out = value; }

// Rounds to nearest, ties to even; a NaN stays one.
PC_HD void from_float(float value, BFloat16* out) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

PC_HD void from_float(float value, Half* out) {
#ifdef __CUDA_ARCH__
    out->bits = __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    const uint32_t small = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);  // the adder rounds subnormals
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    out->bits = static_cast<uint16_t>((magnitude >= 0x47800000u ? large : finite) | ((bits >> 16) & 0x8000u));
#endif
}

PC_HD int clip(int64_t value, int limit) { return static_cast<int>(value < 0 ? 0 : (value > limit ? limit : value)); }

// Computes in double and rounds once, so that every backend samples at the same float32 coordinates. A linear part is
// singular if the magnitude of its determinant is at most 1e-6 of its squared norm. Every comparison is false for a
// NaN.
PC_HD Region prepare_region(const float* affine, const int64_t* rect, int height, int width) {
    const double a = affine[0], b = affine[1], c = affine[2], d = affine[3], e = affine[4], f = affine[5];
    const double determinant = a * e - b * d;
    const double norm = (a * a + b * b) + (d * d + e * e);
    const double largest_float = 3.4028234663852886e38;
    const bool finite = fabs(a) <= largest_float && fabs(b) <= largest_float && fabs(c) <= largest_float &&
                        fabs(d) <= largest_float && fabs(e) <= largest_float && fabs(f) <= largest_float;
    Region region{};
    if (!finite || !(fabs(determinant) > 1e-6 * norm)) return region;
    region.inverse[0] = static_cast<float>(e / determinant);
    region.inverse[1] = static_cast<float>(-b / determinant);
    region.inverse[2] = static_cast<float>((b * f - c * e) / determinant);
    region.inverse[3] = static_cast<float>(-d / determinant);
    region.inverse[4] = static_cast<float>(a / determinant);
    region.inverse[5] = static_cast<float>((c * d - a * f) / determinant);
    region.x0 = clip(rect[0], width);
    region.y0 = clip(rect[1], height);
    region.x1 = clip(rect[2], width);
    region.y1 = clip(rect[3], height);
    return region;
}

PC_HD bool covers(const Region& region, int x, int y) {
    return x >= region.x0 && x < region.x1 && y >= region.y0 && y < region.y1;
}

// Multiplies and adds in exactly this order. The build forbids FMA, so that both paths agree bit for bit.
PC_HD void source_position(const float* inverse, int x, int y, float* source_x, float* source_y) {
    const float fx = static_cast<float>(x), fy = static_cast<float>(y);
    *source_x = (inverse[0] * fx + inverse[1] * fy) + inverse[2];
    *source_y = (inverse[3] * fx + inverse[4] * fy) + inverse[5];
}

// The sample's centre must lie inside the source; false for a NaN.
PC_HD bool is_inside(float source_x, float source_y, int height, int width) {
    return source_x >= 0.0f && source_x <= static_cast<float>(width - 1) && source_y >= 0.0f &&
           source_y <= static_cast<float>(height - 1);
}

template <Mode mode>
PC_HD Taps locate(float source_x, float source_y, int height, int width) {
    Taps taps{};
    if (mode == Mode::nearest) {  // ties to even, as OpenCV
        taps.offset = static_cast<int>(rintf(source_y)) * width + static_cast<int>(rintf(source_x));
        return taps;
    }
    const int left = static_cast<int>(source_x), top = static_cast<int>(source_y);  // never negative: truncation floors
    const float fx = source_x - static_cast<float>(left), fy = source_y - static_cast<float>(top);
    const float gx = 1.0f - fx, gy = 1.0f - fy;
    taps.offset = top * width + left;
    taps.right = left < width - 1 ? 1 : 0;
    taps.down = top < height - 1 ? width : 0;
    taps.w00 = gx * gy;
    taps.w01 = fx * gy;
    taps.w10 = gx * fy;
    taps.w11 = fx * fy;
    if (mode == Mode::unit_variance) {
        const float norm =
            sqrtf((taps.w00 * taps.w00 + taps.w01 * taps.w01) + (taps.w10 * taps.w10 + taps.w11 * taps.w11));
        taps.w00 /= norm;
        taps.w01 /= norm;
        taps.w10 /= norm;
        taps.w11 /= norm;
    }
    return taps;
}

template <Mode mode, typename T>
PC_HD float blend(const T* plane, const Taps& taps) {
    const T* at = plane + taps.offset;
    if (mode == Mode::nearest) return to_float(at[0]);
    const float upper = taps.w00 * to_float(at[0]) + taps.w01 * to_float(at[taps.right]);
    const float lower = taps.w10 * to_float(at[taps.down]) + taps.w11 * to_float(at[taps.down + taps.right]);
    return upper + lower;
}

// Throws bad_alloc if there is no memory for a frame's source as floats; some frames may be written then.
void affine_warp_paste_cpu(const Params& params, int threads);

#ifdef POSECRAFTER_CUDA
// Enqueues the work on `stream` (a cudaStream_t) of a device, and leaves the thread's current device as it was. Returns
// nullptr, or CUDA's error message. Throws invalid_argument for a frame of more pixels than one grid covers.
const char* affine_warp_paste_cuda(const Params& params, int device, void* stream);
const char* cuda_device_error();  // nullptr if a device can be used
#endif

}  // namespace posecrafter
