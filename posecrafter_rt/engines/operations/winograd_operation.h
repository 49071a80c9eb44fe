// The OpenVINO operation posecrafter::Winograd: input (F, C, h, w), weight (out, C, 3, 3), bias (out elements) → what
// the 3×3 convolution gives, in tiles of `tile`. With a GroupNorm's weight and bias (C) as two inputs more, and its
// groups and eps as attributes, it is of SiLU(GroupNorm(input)); with the attribute times 2 it is of the input at twice
// its size. An input after these, as large as the output, is added to it. Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <openvino/op/op.hpp>
#include <vector>

#include "operation.h"
#include "winograd.h"

namespace posecrafter {

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
        const ov::Shape& pixels = inputs[0].get_shape();
        const size_t out_channels = inputs[1].get_shape()[0];
        std::call_once(once_, [&] { pack(inputs[1].data<float>(), pixels[1], out_channels); });
        const int frames = size(pixels[0]), channels = size(pixels[1]), times = size(times_);
        Convolution call{};
        call.input = inputs[0].data<float>();
        call.packed = packed_.get();
        call.bias = inputs[2].data<float>();
        call.residual = inputs.size() % 2 == 0 ? inputs.back().data<float>() : nullptr;
        call.out = outputs[0].data<float>();
        call.frames = frames, call.in_channels = channels, call.out_channels = size(out_channels);
        call.height = size(pixels[2]) * times, call.width = size(pixels[3]) * times, call.times = times;
        call.tile = size(tile_);
        static thread_local std::vector<float> scales;  // and shifts
        if (inputs.size() >= 5) {
            scales.resize(2 * pixels[0] * pixels[1]);
            float *scale = scales.data(), *shift = scale + pixels[0] * pixels[1];
            group_norm_scales({call.input, inputs[3].data<float>(), inputs[4].data<float>(), scale, shift, frames,
                               channels, size(groups_), pixels[2] * pixels[3], eps_},
                              parallel);
            call.scale = scale, call.shift = shift;
        }
        winograd_convolve(call, num_threads(), parallel);
        return true;
    }

private:
    void pack(const float* weight, size_t in, size_t out) const {
        const int tile = size(tile_);
        packed_ = packed_weights(weight, in, out, 9, tile, winograd_products(tile) * in * out, [&](float* to) {
            winograd_pack(weight, static_cast<int>(in), static_cast<int>(out), tile, to, parallel);
        });
    }

    static int size(size_t value) { return static_cast<int>(value); }

    int64_t groups_ = 0;
    double eps_ = 0;
    int64_t times_ = 1;
    int64_t tile_ = 4;
    mutable std::once_flag once_;
    mutable std::shared_ptr<float> packed_;
};

}  // namespace posecrafter
