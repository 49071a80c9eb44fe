// The OpenVINO operation posecrafter::Linear: tokens (F, n, C) or planes (F, C, h, w), weight (out, C, …), bias (out) →
// input · weightᵀ + bias, as tokens (F, h·w, out) or, with the attribute height, as planes of this height. With the
// attribute is_gated the weight's rows are a value's and then a gate's, and it is value · GELU(gate), half as wide.
// With two inputs more, the weight and bias of a layer after a gated one, it is what that one gives. An input after
// these, as large as the output, is added to it. Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <openvino/op/op.hpp>

#include "linear.h"
#include "operation.h"

namespace posecrafter {

class LinearOperation : public ov::op::Op {
public:
    OPENVINO_OP("Linear", "posecrafter");

    LinearOperation() = default;
    LinearOperation(const ov::OutputVector& inputs, int64_t height, bool is_gated)
        : Op(inputs), height_(height), is_gated_(is_gated) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const ov::Shape& input = get_input_shape(0);
        const bool is_double = has_next(get_input_size());
        const size_t rows = get_input_shape(is_double ? 3 : 1)[0], tokens = num_tokens(input);
        const size_t channels = rows / (is_gated_ && !is_double ? 2 : 1);
        ov::Shape out{input[0], tokens, channels};
        if (height_ > 0) out = {input[0], channels, static_cast<size_t>(height_), tokens / height_};
        set_output_type(0, get_input_element_type(0), out);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<LinearOperation>(inputs, height_, is_gated_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("height", height_);
        visitor.on_attribute("is_gated", is_gated_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape& input = inputs[0].get_shape();
        const bool is_double = has_next(inputs.size());
        std::call_once(once_, [&] {
            packed_ = pack(inputs[1]);
            if (is_double) next_ = pack(inputs[3]);
        });
        Linear call{};
        call.input = inputs[0].data<float>();
        call.layer = layer(packed_.get(), inputs[1], inputs[2], is_gated_);
        if (is_double) call.next = layer(next_.get(), inputs[3], inputs[4], false);
        call.residual = inputs.size() % 2 == 0 ? inputs.back().data<float>() : nullptr;
        call.out = outputs[0].data<float>();
        call.frames = static_cast<int>(input[0]), call.size = static_cast<int>(num_tokens(input));
        call.from_planes = input.size() == 4, call.to_planes = height_ > 0, call.is_gated = is_gated_;
        linear(call, num_threads(), parallel);
        return true;
    }

private:
    static size_t num_tokens(const ov::Shape& input) { return input.size() == 4 ? input[2] * input[3] : input[1]; }

    static bool has_next(size_t num_inputs) { return num_inputs >= 5; }

    static std::shared_ptr<float> pack(const ov::Tensor& weight) {
        const size_t out = weight.get_shape()[0], in = weight.get_size() / out;
        return packed_weights(weight.data<float>(), in, out, 1, 0, in * out, [&](float* to) {
            linear_pack(weight.data<float>(), static_cast<int>(in), static_cast<int>(out), to, parallel);
        });
    }

    static Layer layer(const float* packed, const ov::Tensor& weight, const ov::Tensor& bias, bool is_gated) {
        const size_t out = weight.get_shape()[0], in = weight.get_size() / out;
        return {packed, bias.data<float>(), static_cast<int>(in), static_cast<int>(is_gated ? out / 2 : out)};
    }

    int64_t height_ = 0;
    bool is_gated_ = false;
    mutable std::once_flag once_;
    mutable std::shared_ptr<float> packed_, next_;
};

}  // namespace posecrafter
