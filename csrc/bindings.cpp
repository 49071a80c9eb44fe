// posecrafter_rt._native: Python's way to affine_warp_paste, with raw pointers and a stream.
// Layer 2: checks what would make the kernels read or write astray; knows no torch, so one build serves every version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "affine_warp_paste.h"

#ifndef POSECRAFTER_CUDA_ARCHS
#define POSECRAFTER_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace {

using posecrafter::DType;
using posecrafter::Mode;
using posecrafter::Params;

constexpr int kMaxRegions = 1024;  // the CUDA path's region table stays within 48 KiB of shared memory

int as_size(int64_t value, int64_t least, const char* name) {
    if (value < least || value > std::numeric_limits<int>::max())
        throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + " is out of range");
    return static_cast<int>(value);
}

Params make_params(uintptr_t source, uintptr_t out, uintptr_t affines, uintptr_t rects, const py::tuple& shape,
                   const py::tuple& form) {
    const auto size = [&](size_t i) { return shape[i].cast<int64_t>(); };
    Params p{};
    p.source = reinterpret_cast<const void*>(source);
    p.out = reinterpret_cast<void*>(out);
    p.affines = reinterpret_cast<const float*>(affines);
    p.rects = reinterpret_cast<const int64_t*>(rects);
    p.frames = as_size(size(0), 0, "frames");
    p.lead = as_size(size(1), 0, "lead");
    p.regions = as_size(size(2), 0, "regions");
    p.channels = as_size(size(3), 1, "channels");
    p.height = as_size(size(4), 1, "height");
    p.width = as_size(size(5), 1, "width");
    p.mode = static_cast<Mode>(form[0].cast<int>());
    p.dtype = static_cast<DType>(form[1].cast<int>());
    const bool is_shared = form[2].cast<bool>();
    p.copy = form[3].cast<bool>();
    as_size(static_cast<int64_t>(p.height) * p.width, 1, "height × width");
    if (p.regions > kMaxRegions)
        throw std::invalid_argument("regions = " + std::to_string(p.regions) + " exceeds 1024");
    if (static_cast<int>(p.mode) < 0 || static_cast<int>(p.mode) > 2) throw std::invalid_argument("unknown mode");
    if (static_cast<int>(p.dtype) < 0 || static_cast<int>(p.dtype) > 2) throw std::invalid_argument("unknown dtype");
    p.source_stride = is_shared ? 0 : static_cast<int64_t>(p.channels) * p.height * p.width;
    const bool has_edits = p.frames > p.lead && p.regions > 0;
    if (p.frames > 0 && (source == 0 || out == 0)) throw std::invalid_argument("null latent");
    if (has_edits && (affines == 0 || rects == 0)) throw std::invalid_argument("null affines or rects");
    return p;
}

void run_cpu(uintptr_t source, uintptr_t out, uintptr_t affines, uintptr_t rects, const py::tuple& shape,
             const py::tuple& form, int threads) {
    const Params p = make_params(source, out, affines, rects, shape, form);
    py::gil_scoped_release release;
    posecrafter::affine_warp_paste_cpu(p, threads);
}

#ifdef POSECRAFTER_CUDA
void run_cuda(uintptr_t source, uintptr_t out, uintptr_t affines, uintptr_t rects, const py::tuple& shape,
              const py::tuple& form, uintptr_t stream) {
    const Params p = make_params(source, out, affines, rects, shape, form);
    if (p.frames == 0) return;
    if (p.source == p.out) throw std::invalid_argument("the CUDA path reads a snapshot: source and out must differ");
    const char* error = posecrafter::affine_warp_paste_cuda(p, reinterpret_cast<void*>(stream));
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
    m.doc() =
        "affine_warp_paste for CPU and CUDA; pointers are addresses, shape = (frames, lead, regions, channels, "
        "height, width), form = (mode, dtype, is_shared, copy).";
    m.def("affine_warp_paste_cpu", &run_cpu, py::arg("source"), py::arg("out"), py::arg("affines"), py::arg("rects"),
          py::arg("shape"), py::arg("form"), py::arg("threads"));
#ifdef POSECRAFTER_CUDA
    m.def("affine_warp_paste_cuda", &run_cuda, py::arg("source"), py::arg("out"), py::arg("affines"), py::arg("rects"),
          py::arg("shape"), py::arg("form"), py::arg("stream"));
#endif
    m.def("build_info", &build_info, "What this build holds: cuda, openmp, cuda_archs, compiler.");
    m.def("cuda_error", &cuda_error, "None where a CUDA device can be used, else the reason.");
}
