// posecrafter_rt._native: Python's access to affine_warp_paste, with DLPack arrays and a stream's address.
// Layer 2: checks what would make the kernels read or write astray. It knows no torch, so one build serves every
// version.
#include <pybind11/pybind11.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <string>

#include "affine_warp_paste.h"
#include "array.h"

#ifndef POSECRAFTER_CUDA_ARCHS
#define POSECRAFTER_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

using posecrafter::Array;
using posecrafter::DType;
using posecrafter::Mode;
using posecrafter::Params;
using posecrafter::dlpack::DeviceType;
using posecrafter::dlpack::TypeCode;

constexpr int kMaxRegions = 1024;  // the CUDA path's region table stays within 48 KiB of shared memory

// The arguments of one call. Members are constructed, and so imported, in this order.
struct Arrays {
    Array source, out, affines, rects;

    std::array<const Array*, 4> all() const { return {&source, &out, &affines, &rects}; }
};

int as_size(int64_t value, int64_t least, const char* name) {
    if (value < least || value > std::numeric_limits<int>::max())
        throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + " is out of range");
    return static_cast<int>(value);
}

Mode mode_of(const std::string& name) {
    if (name == "bilinear") return Mode::bilinear;
    if (name == "nearest") return Mode::nearest;
    if (name == "unit_variance") return Mode::unit_variance;
    throw std::invalid_argument("unknown mode " + name);
}

DType dtype_of(const Array& array) {
    if (array.has_type(TypeCode::floating, 32)) return DType::fp32;
    if (array.has_type(TypeCode::floating, 16)) return DType::fp16;
    if (array.has_type(TypeCode::bfloat, 16)) return DType::bf16;
    array.refuse("want float32, float16 or bfloat16");
}

// Only `out` is written, so it must be writable and share no memory with the others. A source that has frames may be
// `out` itself if nothing is copied.
void check_memory(const Arrays& arrays, bool copy) {
    const auto& [source, out, affines, rects] = arrays;
    if (out.is_read_only()) out.refuse("is read-only, and would be written");
    const bool is_in_place = !copy && source.ndim() == 4 && source.data() == out.data();
    if (source.overlaps(out) && !is_in_place) source.refuse("shares memory with out");
    if (affines.overlaps(out)) affines.refuse("shares memory with out");
    if (rects.overlaps(out)) rects.refuse("shares memory with out");
}

Params make_params(const Arrays& arrays, const std::string& mode, bool copy) {
    const auto& [source, out, affines, rects] = arrays;
    Params p{};
    p.dtype = dtype_of(out);
    p.mode = mode_of(mode);
    p.copy = copy;
    if (!source.has_type_of(out)) source.refuse("want the type of out");
    if (!affines.has_type(TypeCode::floating, 32)) affines.refuse("want float32");
    if (!rects.has_type(TypeCode::integer, 64)) rects.refuse("want int64");

    if (out.ndim() != 4) out.refuse("want sizes (F, C, h, w)");
    p.frames = as_size(out.size(0), 0, "frames");
    p.channels = as_size(out.size(1), 1, "channels");
    p.height = as_size(out.size(2), 1, "height");
    p.width = as_size(out.size(3), 1, "width");
    as_size(out.size(2) * out.size(3), 1, "height × width");
    const bool is_shared = source.ndim() == 3;
    if (is_shared)
        source.want_sizes("(C, h, w) of out", 0, {out.size(1), out.size(2), out.size(3)});
    else
        source.want_sizes("(F, C, h, w) of out, or without F", 0, {out.size(0), out.size(1), out.size(2), out.size(3)});
    p.source_stride = is_shared ? 0 : out.size(1) * out.size(2) * out.size(3);

    if (affines.ndim() != 4) affines.refuse("want sizes (N, R, 2, 3)");
    affines.want_sizes("(N, R, 2, 3)", 2, {2, 3});
    rects.want_sizes("(N, R, 4) of affines", 0, {affines.size(0), affines.size(1), 4});
    if (affines.size(0) > out.size(0)) affines.refuse("more edits than out has frames");
    p.lead = static_cast<int>(out.size(0) - affines.size(0));
    p.regions = as_size(affines.size(1), 0, "regions");
    if (p.regions > kMaxRegions)
        throw std::invalid_argument("regions = " + std::to_string(p.regions) + " exceeds 1024");

    check_memory(arrays, copy);
    p.source = source.data();
    p.out = out.data();
    p.affines = static_cast<const float*>(affines.data());
    p.rects = static_cast<const int64_t*>(rects.data());
    return p;
}

void run_cpu(const py::object& source, const py::object& out, const py::object& affines, const py::object& rects,
             const std::string& mode, bool copy, int threads) {
    const Arrays arrays{{"source", source}, {"out", out}, {"affines", affines}, {"rects", rects}};
    for (const Array* array : arrays.all())
        if (!array->is_on_cpu()) array->refuse("want memory of the CPU");
    const Params p = make_params(arrays, mode, copy);
    py::gil_scoped_release release;  // the GIL is taken back before the arrays are released
    posecrafter::affine_warp_paste_cpu(p, threads);
}

#ifdef POSECRAFTER_CUDA
void run_cuda(const py::object& source, const py::object& out, const py::object& affines, const py::object& rects,
              const std::string& mode, bool copy, uintptr_t stream) {
    const Arrays arrays{
        {"source", source, stream}, {"out", out, stream}, {"affines", affines, stream}, {"rects", rects, stream}};
    const int device = arrays.out.device().index;
    for (const Array* array : arrays.all())
        if (array->device().type != DeviceType::cuda || array->device().index != device)
            array->refuse("want memory of one CUDA device");
    const Params p = make_params(arrays, mode, copy);
    if (p.frames == 0) return;
    if (p.source == p.out) arrays.source.refuse("the CUDA path reads a snapshot: source and out must differ");
    const char* error = posecrafter::affine_warp_paste_cuda(p, device, reinterpret_cast<void*>(stream));
    if (error != nullptr) throw std::runtime_error(std::string("affine_warp_paste: CUDA says ") + error);
}
#endif

py::dict build_info() {
    py::dict info;
#ifdef POSECRAFTER_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["cuda_archs"] = POSECRAFTER_CUDA_ARCHS;
    info["compiler"] = __VERSION__;
    return info;
}

py::object cuda_error() {
#ifdef POSECRAFTER_CUDA
    const char* error = posecrafter::cuda_device_error();
    return error == nullptr ? py::object(py::none()) : py::object(py::str(error));
#else
    return py::str("built without CUDA");
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = R"(affine_warp_paste for CPU and CUDA, over arrays of any library that speaks DLPack.

source (C, h, w) or (F, C, h, w) and out (F, C, h, w): float32, float16 or bfloat16; affines float32 (N, R, 2, 3), rects
int64 (N, R, 4): compact arrays or DLPack capsules (which are used up) on one device. The last N frames of out are edited;
with copy, out's other pixels are written too. Raises ValueError for an array that does not fit, TypeError for no array.)";
    m.def("affine_warp_paste_cpu", &run_cpu, py::arg("source"), py::arg("out"), py::arg("affines"), py::arg("rects"),
          py::arg("mode") = "bilinear", py::arg("copy") = true, py::arg("threads") = 1,
          "Write out. source may be out itself where copy is false.");
#ifdef POSECRAFTER_CUDA
    m.def("affine_warp_paste_cuda", &run_cuda, py::arg("source"), py::arg("out"), py::arg("affines"), py::arg("rects"),
          py::arg("mode") = "bilinear", py::arg("copy") = true, py::arg("stream") = 0,
          "Enqueue the writing of out on a stream of its device; stream: a cudaStream_t as an integer.");
#endif
    m.def("build_info", &build_info, "What this build holds: cuda, openmp, cuda_archs, compiler.");
    m.def("cuda_error", &cuda_error, "None where a CUDA device can be used, else the reason.");
}
