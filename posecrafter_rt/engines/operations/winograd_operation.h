// The OpenVINO operation posecrafter::Winograd: input (F, C, h, w), weight (out, C, 3, 3), bias (out elements) → what
// the 3×3 convolution gives, in tiles of `tile`. With a GroupNorm's weight and bias (C) as two inputs more, and its
// groups and eps as attributes, it is of SiLU(GroupNorm(input)); with the attribute times 2 it is of the input at twice
// its size. An input after these, as large as the output, is added to it. Weights are constant: they are packed at the
// first call. Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <openvino/op/op.hpp>
#include <vector>

#include "operation.h"
#include "products.h"
#include "winograd.h"

namespace posecrafter {

class WinogradOperation : public ov::op::Op {
public:
    OPENVINO_OP("Winograd", "posecrafter");

    WinogradOperation() = default;
    WinogradOperation(const ov::OutputVector& inputs, int64_t groups, double eps, int64_t times, int64_t tile)
        : Op(inputs), groups_(groups), eps_(eps), times_(times), tile_(tile) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const ov::Shape &pixels = get_input_shape(0), &weight = get_input_shape(1);
        const size_t times = static_cast<size_t>(times_);
        const ov::Shape out{pixels[0], weight[0], pixels[2] * times, pixels[3] * times};
        check(out);
        set_output_type(0, get_input_element_type(0), out);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<WinogradOperation>(inputs, groups_, eps_, times_, tile_);
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
        std::call_once(once_, [&] { pack(inputs[1]); });
        const int frames = size(pixels[0]), channels = size(pixels[1]), times = size(times_);
        Convolution call{};
        call.input = inputs[0].data<float>();
        call.packed = packed_.get();
        call.bias = inputs[2].data<float>();
        call.residual = has_residual(inputs.size()) ? inputs.back().data<float>() : nullptr;
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
    void check(const ov::Shape& out) const {
        const ov::Shape &pixels = get_input_shape(0), &weight = get_input_shape(1);
        const size_t inputs = get_input_size(), groups = static_cast<size_t>(groups_);
        OPENVINO_ASSERT((tile_ == 2 || tile_ == 4) && (times_ == 1 || times_ == 2), "tiles are of 2×2 or 4×4");
        OPENVINO_ASSERT(weight == (ov::Shape{weight[0], pixels[1], 3, 3}), "weights that do not fit");
        OPENVINO_ASSERT(pixels[1] % kLanes == 0 && weight[0] % kPanel == 0,
                        "channels come in whole vectors and panels");
        OPENVINO_ASSERT(ov::shape_size(get_input_shape(2)) == weight[0], "a bias that does not fit");
        OPENVINO_ASSERT(inputs >= 3 && inputs <= 6, "inputs that do not fit");
        for (size_t norm = 3; inputs >= 5 && norm < 5; ++norm)
            OPENVINO_ASSERT(groups > 0 && pixels[1] % groups == 0 && ov::shape_size(get_input_shape(norm)) == pixels[1],
                            "a norm that does not fit");
        OPENVINO_ASSERT(!has_residual(inputs) || get_input_shape(inputs - 1) == out, "a residual of another shape");
    }

    void pack(const ov::Tensor& weight) const {
        const size_t out = weight.get_shape()[0], in = weight.get_shape()[1];
        const int tile = size(tile_);
        packed_ = packed_weights(weight, in, tile, winograd_products(tile) * in * out, [&](float* to) {
            winograd_pack(weight.data<float>(), size(in), size(out), tile, to, parallel);
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
