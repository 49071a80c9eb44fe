// The OpenVINO operation posecrafter::Winograd: input (F, C, h, w), weight (out, C, 3, 3), bias (out) → what the
// 3×3 convolution gives, in tiles of `tile`. With a GroupNorm's weight and bias (C) as two inputs more, and its groups
// and eps as attributes, it is of SiLU(GroupNorm(input)); with the attribute times 2 it is of the input at twice its
// size. Layer 4: compiled against the OpenVINO that is installed, by openvino_winograd.py.
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/op/op.hpp>
#include <string_view>
#include <tuple>
#include <vector>

#include "winograd.h"

namespace posecrafter {
namespace {

// OpenVINO's own threads: others would have to share the cores with them. A thread that waits here takes up no other
// work, which might be another convolution that wants its scratch.
void parallel(int count, const std::function<void(int)>& task) {
    tbb::this_task_arena::isolate([&] { tbb::parallel_for(0, count, task); });
}

using Weights = std::tuple<size_t, size_t, size_t, int>;  // a hash of their bytes, input and output channels, the tile

// The transformed weights of a convolution, one copy of each tile for all numbers of frames.
std::shared_ptr<float> packed_weights(const float* weight, size_t in_channels, size_t out_channels, int tile) {
    static std::mutex mutex;
    static std::map<Weights, std::weak_ptr<float>> known;
    const std::string_view bytes(reinterpret_cast<const char*>(weight), in_channels * out_channels * 9 * sizeof(float));
    const Weights key{std::hash<std::string_view>()(bytes), in_channels, out_channels, tile};
    const std::lock_guard<std::mutex> lock(mutex);
    if (std::shared_ptr<float> found = known[key].lock()) return found;
    const std::shared_ptr<float> packed(allocate_floats(winograd_products(tile) * in_channels * out_channels),
                                        std::free);
    OPENVINO_ASSERT(packed != nullptr, "out of memory: transformed weights");
    winograd_pack(weight, static_cast<int>(in_channels), static_cast<int>(out_channels), tile, packed.get(), parallel);
    known[key] = packed;
    return packed;
}

}  // namespace

class Winograd : public ov::op::Op {
public:
    OPENVINO_OP("Winograd", "posecrafter");

    Winograd() = default;
    Winograd(const ov::OutputVector& inputs, int64_t groups, double eps, int64_t times, int64_t tile)
        : Op(inputs), groups_(groups), eps_(eps), times_(times), tile_(tile) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        OPENVINO_ASSERT(tile_ == 2 || tile_ == 4, "tiles are of 2×2 or 4×4");
        const auto &pixels = get_input_partial_shape(0), &weight = get_input_partial_shape(1);
        set_output_type(0, get_input_element_type(0), {pixels[0], weight[0], pixels[2] * times_, pixels[3] * times_});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Winograd>(inputs, groups_, eps_, times_, tile_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("groups", groups_);
        visitor.on_attribute("eps", eps_);
        visitor.on_attribute("times", times_);
        visitor.on_attribute("tile", tile_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape &pixels = inputs[0].get_shape(), &weight = inputs[1].get_shape();
        std::call_once(once_,
                       [&] { packed_ = packed_weights(inputs[1].data<float>(), weight[1], weight[0], size(tile_)); });
        const int frames = size(pixels[0]), channels = size(pixels[1]), times = size(times_);
        Convolution call{};
        call.input = inputs[0].data<float>();
        call.packed = packed_.get();
        call.bias = inputs[2].data<float>();
        call.out = outputs[0].data<float>();
        call.frames = frames, call.in_channels = channels, call.out_channels = size(weight[0]);
        call.height = size(pixels[2]) * times, call.width = size(pixels[3]) * times, call.times = times;
        call.tile = size(tile_);
        static thread_local std::vector<float> scales;  // and shifts
        if (inputs.size() == 5) {
            scales.resize(2 * pixels[0] * pixels[1]);
            float *scale = scales.data(), *shift = scale + pixels[0] * pixels[1];
            group_norm_scales({call.input, inputs[3].data<float>(), inputs[4].data<float>(), scale, shift, frames,
                               channels, size(groups_), pixels[2] * pixels[3], eps_},
                              parallel);
            call.scale = scale, call.shift = shift;
        }
        winograd_convolve(call, tbb::this_task_arena::max_concurrency(), parallel);
        return true;
    }

private:
    static int size(size_t value) { return static_cast<int>(value); }

    int64_t groups_ = 0;
    double eps_ = 0;
    int64_t times_ = 1;
    int64_t tile_ = 4;
    mutable std::once_flag once_;
    mutable std::shared_ptr<float> packed_;
};

}  // namespace posecrafter

OPENVINO_CREATE_EXTENSIONS(
    std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<posecrafter::Winograd>>()}));
