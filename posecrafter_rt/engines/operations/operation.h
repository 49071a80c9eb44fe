// What the OpenVINO operations share: threads and packed weights. Layer 4: openvino_operations.py compiles these files
// against the installed OpenVINO.
#pragma once

#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/partitioner.h>
#include <oneapi/tbb/task_arena.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <openvino/op/constant.hpp>
#include <openvino/runtime/tensor.hpp>
#include <string_view>
#include <tuple>
#include <vector>

#include "group_norm.h"
#include "memory.h"
#include "parallel.h"

namespace posecrafter {

// Runs tasks on OpenVINO's own threads; other threads would compete with them for the cores. Isolated, so that a thread
// that waits here cannot start another operation, which would use the same scratch memory.
inline void parallel(int count, const std::function<void(int)>& task) {
    tbb::this_task_arena::isolate([&] { tbb::parallel_for(0, count, task, tbb::static_partitioner()); });
}

inline int num_threads() { return tbb::this_task_arena::max_concurrency(); }

// Identifies packed weights: a hash of the original bytes, the input and output channels, and the kind of packing.
using WeightsKey = std::tuple<size_t, size_t, size_t, int>;

constexpr int kInFloats = 0, kInFormat = 1, kDoubledInFormat = 3;  // the kinds of packing; 2 and 4 are Winograd's tiles

// A layer's packed weights, and the shape of the constant that they were made from: (out, in, …), or (in, out, 4, 4) of
// a transposed convolution.
struct Weights {
    std::shared_ptr<float> packed;
    ov::Shape shape;
};

// Returns a layer's weights (out, in, taps) as pack(to) writes them, `floats` floats. All input shapes share one copy
// per format, which is freed when nothing uses it any more.
template <class Format>
Weights packed_weights(const ov::Tensor& weight, size_t in, int kind, size_t floats,
                       const std::function<void(float*)>& pack) {
    static std::mutex mutex;
    static std::map<WeightsKey, std::weak_ptr<float>> known;
    const std::string_view bytes(static_cast<const char*>(weight.data()), weight.get_byte_size());
    const WeightsKey key{std::hash<std::string_view>()(bytes), in, weight.get_shape()[0], kind};
    const std::lock_guard<std::mutex> lock(mutex);
    if (std::shared_ptr<float> found = known[key].lock()) {
        let_go_of_packed(weight.data());
        return {found, weight.get_shape()};
    }
    for (auto it = known.begin(); it != known.end();) it = it->second.expired() ? known.erase(it) : std::next(it);
    const std::shared_ptr<float> packed(allocate_floats(floats), std::free);
    pack(packed.get());
    let_go_of_packed(weight.data());
    known[key] = packed;
    return {packed, weight.get_shape()};
}

using PackWeights = std::function<Weights(const ov::Tensor&)>;

// Packs input `index` of an operation, a constant, and puts the address of the packed weights in its place. So the
// model does not keep the original weights, which are gigabytes in a large network. The address also keeps nodes apart:
// OpenVINO merges nodes whose inputs are equal. A model with such a node cannot be saved.
inline Weights hold_weights(ov::Node& node, size_t index, const PackWeights& pack) {
    const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(node.get_input_node_shared_ptr(index));
    OPENVINO_ASSERT(constant != nullptr, "only constant weights can be held");
    const Weights weights = pack(constant->get_tensor_view());
    const auto place = reinterpret_cast<int64_t>(weights.packed.get());
    node.input(index).replace_source_output(ov::op::v0::Constant::create(ov::element::i64, {1}, {place}));
    return weights;
}

// A constant's numbers. They are copied when weights are packed, so that the constants' memory, perhaps a file, is not
// read again.
using Numbers = std::vector<float>;

inline Numbers numbers(const ov::Tensor& constant) {
    const float* first = constant.data<float>();
    return {first, first + constant.get_size()};
}

// The constants of a norm.
struct Norm {
    Numbers weight, bias;
};

// Returns a GroupNorm of pictures (frames, channels, height, width) as scales and shifts, which are valid until this
// thread's next call.
inline PlaneScales group_norm_of(const ov::Tensor& pictures, const Norm& norm, int64_t groups, double eps) {
    static thread_local std::vector<float> scales;  // the scales, then the shifts
    const ov::Shape& shape = pictures.get_shape();
    const size_t count = shape[0] * shape[1];
    scales.resize(2 * count);
    float *scale = scales.data(), *shift = scale + count;
    group_norm_scales(
        {pictures.data<float>(), norm.weight.data(), norm.bias.data(), scale, shift, static_cast<int>(shape[0]),
         static_cast<int>(shape[1]), static_cast<int>(groups), shape[2] * shape[3], eps},
        parallel);
    return {scale, shift};
}

// Whether the last input is a residual, which is added to the output. Without one, inputs are a tensor and pairs of a
// weight and a bias, so their number is odd.
inline bool has_residual(size_t num_inputs) { return num_inputs % 2 == 0; }

}  // namespace posecrafter
