// The OpenVINO operation posecrafter::Linear: tokens (F, n, C) or planes (F, C, h, w), weight (out, C, …), bias (out) →
// input · weightᵀ + bias as tokens (F, h·w, out). More inputs and attributes:
// - height: the output is planes of this height;
// - is_gated: the weight has a value's rows, then a gate's. The output is value · GELU(gate), half as wide;
// - the weight and bias of a layer after a gated one: the output is that layer's;
// - a last input as large as the output: it is added to the output;
// - eps: a norm's weight and bias (C) follow the input. Tokens have a LayerNorm, planes a GroupNorm of `groups` groups;
// - widths: one output for each, with so many channels; nothing is added to them;
// - in_bytes: products are in eight bits;
// - in_halves: weights are in 16 bits, and products too if the processor has VNNI;
// - holds_weights: weights are packed when the node is made, not at the first call. They are constants.
// Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <openvino/op/op.hpp>
#include <vector>

#include "byte_format.h"
#include "digit_format.h"
#include "linear.h"
#include "operation.h"
#include "products.h"
#include "word_format.h"

namespace posecrafter {

class LinearOperation : public ov::op::Op {
public:
    OPENVINO_OP("Linear", "posecrafter");

    LinearOperation() = default;
    LinearOperation(const ov::OutputVector& inputs, const LinearOperation& like)
        : Op(inputs),
          height_(like.height_),
          is_gated_(like.is_gated_),
          groups_(like.groups_),
          eps_(like.eps_),
          widths_(like.widths_),
          in_bytes_(like.in_bytes_),
          in_halves_(like.in_halves_),
          holds_weights_(like.holds_weights_) {
        if (holds_weights_) first_ = like.first_, next_ = like.next_;
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const ov::Shape& input = get_input_shape(0);
        const bool is_double = has_next(num_inputs());
        const size_t rows = weight_shape(is_double)[0], tokens = num_tokens(input);
        const size_t channels = rows / (is_gated_ && !is_double ? 2 : 1);
        ov::Shape out{input[0], tokens, channels};
        if (height_ > 0) out = {input[0], channels, static_cast<size_t>(height_), tokens / height_};
        check(out);
        set_output_type(0, get_input_element_type(0), out);
        for (size_t part = 0; part < widths_.size(); ++part) {
            out[2] = widths_[part];
            set_output_type(part, get_input_element_type(0), out);
        }
        if (!holds_weights_ || first_.packed != nullptr) return;
        const PackWeights pack_weights = [this](const ov::Tensor& weight) { return pack(weight); };
        first_ = hold_weights(*this, weight_at(), pack_weights);
        if (is_double) next_ = hold_weights(*this, weight_at() + 2, pack_weights);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<LinearOperation>(inputs, *this);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("height", height_);
        visitor.on_attribute("is_gated", is_gated_);
        visitor.on_attribute("groups", groups_);
        visitor.on_attribute("eps", eps_);
        visitor.on_attribute("widths", widths_);
        visitor.on_attribute("in_bytes", in_bytes_);
        visitor.on_attribute("in_halves", in_halves_);
        visitor.on_attribute("holds_weights", holds_weights_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape& input = inputs[0].get_shape();
        const bool is_double = has_next(num_inputs());
        const size_t at = weight_at();
        std::call_once(once_, [&] {
            bias_ = numbers(inputs[at + 1]);
            if (is_double) next_bias_ = numbers(inputs[at + 3]);
            if (eps_ > 0) norm_ = {numbers(inputs[1]), numbers(inputs[2])};
            if (holds_weights_) return;
            first_ = pack(inputs[at]);
            if (is_double) next_ = pack(inputs[at + 2]);
        });
        Linear call{};
        call.input = inputs[0].data<float>();
        if (eps_ > 0 && groups_ == 0) call.norm = {norm_.weight.data(), norm_.bias.data(), eps_};
        if (eps_ > 0 && groups_ > 0) call.scales = group_norm_of(inputs[0], norm_, groups_, eps_);
        call.layer = layer(first_, bias_, is_gated_);
        if (is_double) call.next = layer(next_, next_bias_, false);
        call.residual = has_residual(num_inputs()) ? inputs.back().data<float>() : nullptr;
        call.out = outputs[0].data<float>();
        for (size_t part = 0; part < widths_.size(); ++part)
            call.parts.push_back({outputs[part].data<float>(), static_cast<int>(widths_[part])});
        call.frames = static_cast<int>(input[0]), call.size = static_cast<int>(num_tokens(input));
        call.from_planes = input.size() == 4, call.to_planes = height_ > 0, call.is_gated = is_gated_;
        map()(call, num_threads(), parallel);
        return true;
    }

private:
    decltype(&linear<float>) map() const {
#ifdef PC_HAS_VNNI
        if (in_bytes_) return linear<Bytes>;
#endif
#ifdef PC_HAS_TILES
        if (in_halves_ && may_use_tiles()) return linear<Digits>;
#endif
#ifdef PC_HAS_VNNI
        if (in_halves_) return linear<Words>;
#endif
        return in_halves_ ? linear<Half> : linear<float>;
    }

    void check(const ov::Shape& out) const {
        OPENVINO_ASSERT(!in_bytes_ || !in_halves_, "weights in both 8 and 16 bits");
        const size_t inputs = num_inputs(), in = get_input_shape(0)[get_input_shape(0).size() == 4 ? 1 : 2];
        OPENVINO_ASSERT(inputs >= 3 && inputs <= 6 && (is_gated_ || !has_next(inputs)), "layers that do not fit");
        check_layer(false, in, is_gated_ ? 2 : 1);
        if (has_next(inputs)) check_layer(true, weight_shape(false)[0] / 2, 1);
        check_parts(out);
        for (size_t norm = 1; norm < weight_at(); ++norm)
            OPENVINO_ASSERT(get_input_shape(norm) == ov::Shape{in} &&
                                (get_input_shape(0).size() == 3 ? groups_ == 0 : groups_ > 0 && in % groups_ == 0),
                            "a norm that does not fit");
        OPENVINO_ASSERT(get_input_shape(0).size() == 3 || in % kLanes == 0, "planes come in whole vectors");
        OPENVINO_ASSERT(ov::shape_size(out) * in == ov::shape_size(get_input_shape(0)) * out[height_ > 0 ? 1 : 2],
                        "a height that does not fit");
        OPENVINO_ASSERT(!has_residual(inputs) || get_input_shape(get_input_size() - 1) == out,
                        "a residual of another shape");
    }

    void check_parts(const ov::Shape& out) const {
        size_t channels = 0;
        for (const int64_t width : widths_) {
            OPENVINO_ASSERT(width > 0 && width % kPanel == 0, "parts come in whole panels");
            channels += width;
        }
        OPENVINO_ASSERT(widths_.empty() || (channels == out[2] && height_ == 0 && num_inputs() % 2 == 1),
                        "parts that do not fit");
    }

    void check_layer(bool is_next, size_t in, size_t parts) const {
        const ov::Shape& weight = weight_shape(is_next);
        OPENVINO_ASSERT(ov::shape_size(weight) == weight[0] * in && weight[0] % (parts * kPanel) == 0,
                        "weights that do not fit");
        OPENVINO_ASSERT(!in_bytes_ || (kHasBytes && in % kFour == 0), "what eight bits do not serve");
        const size_t bias = weight_at() + (is_next ? 3 : 1);
        OPENVINO_ASSERT(ov::shape_size(get_input_shape(bias)) == weight[0], "a bias that does not fit");
    }

    static size_t num_tokens(const ov::Shape& input) { return input.size() == 4 ? input[2] * input[3] : input[1]; }

    static bool has_next(size_t num_inputs) { return num_inputs >= 5; }

    // The index of the first weight, and the number of inputs without the norm's.
    size_t weight_at() const { return eps_ > 0 ? 3 : 1; }
    size_t num_inputs() const { return get_input_size() + 1 - weight_at(); }

    const ov::Shape& weight_shape(bool is_next) const {
        const Weights& weights = is_next ? next_ : first_;
        return weights.packed == nullptr ? get_input_shape(weight_at() + (is_next ? 2 : 0)) : weights.shape;
    }

    Weights pack(const ov::Tensor& weight) const {
        if (in_bytes_) return pack_format<Bytes>(weight);
#ifdef PC_HAS_TILES
        if (in_halves_ && may_use_tiles()) return pack_format<Digits>(weight);
#endif
#ifdef PC_HAS_VNNI
        if (in_halves_) return pack_format<Words>(weight);
#endif
        return in_halves_ ? pack_numbers<Half>(weight) : pack_numbers<float>(weight);
    }

    template <class Format>
    static Weights pack_format(const ov::Tensor& weight) {
        const int rows = static_cast<int>(weight.get_shape()[0]), columns = static_cast<int>(weight.get_size()) / rows;
        return packed_weights<Format>(
            weight, columns, kInFormat, rows / kPanel * Format::panel(columns),
            [&](float* to) { Format::pack(weight.data<float>(), columns, 1, rows, to, parallel); });
    }

    template <class Number>
    static Weights pack_numbers(const ov::Tensor& weight) {
        const size_t out = weight.get_shape()[0], in = weight.get_size() / out;
        const size_t floats = in * out * sizeof(Number) / sizeof(float);
        return packed_weights<Number>(weight, in, kInFloats, floats, [&](float* to) {
            linear_pack(weight.data<float>(), static_cast<int>(in), static_cast<int>(out),
                        reinterpret_cast<Number*>(to), parallel);
        });
    }

    static Layer layer(const Weights& weights, const Numbers& bias, bool is_gated) {
        const size_t out = weights.shape[0], in = ov::shape_size(weights.shape) / out;
        return {weights.packed.get(), bias.data(), static_cast<int>(in), static_cast<int>(is_gated ? out / 2 : out)};
    }

    int64_t height_ = 0;
    bool is_gated_ = false;
    int64_t groups_ = 0;
    double eps_ = 0;
    std::vector<int64_t> widths_;
    bool in_bytes_ = false;
    bool in_halves_ = false;
    bool holds_weights_ = false;
    mutable std::once_flag once_;
    mutable Weights first_, next_;
    mutable Numbers bias_, next_bias_;
    mutable Norm norm_;
};

}  // namespace posecrafter
