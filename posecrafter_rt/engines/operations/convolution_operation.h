// The OpenVINO operation posecrafter::FusedConvolution: input (F, C, h, w), weight (out, C, 3, 3), bias (out elements)
// → the convolution with padding 1. More inputs and attributes:
// - stride: 1 or 2;
// - planes: the output has only the first `planes` channels;
// - added_at: an input after the bias. Its numbers from added_at on are added to the bias;
// - groups, eps: with a GroupNorm's weight and bias (C) as inputs, the convolution is of SiLU(GroupNorm(input)), or
//   with groups 0 of SiLU(input · weight + bias);
// - a last input as large as the output: it is added to the output;
// - times 2: the convolution is of the input at twice its size. With tile 0 the weight is then (C, out, 4, 4), of a
//   transposed convolution with stride 2;
// - tile: 2 or 4 for Winograd's filtering in tiles of 2×2 or 4×4 outputs, with stride 1, where in_halves keeps the
//   weights of tiles of 2×2 in 16 bits; 0 for products in eight bits, or with in_halves in 16;
// - holds_weights: weights are packed when the node is made, not at the first call. They are constants.
// With tiles and without a norm, C may be less than a vector; the weight is then padded with zeros to a vector.
// Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <openvino/op/op.hpp>
#include <vector>

#include "byte_format.h"
#include "convolution.h"
#include "operation.h"
#include "products.h"
#include "winograd.h"

namespace posecrafter {

class ConvolutionOperation : public ov::op::Op {
public:
    OPENVINO_OP("FusedConvolution", "posecrafter");

    ConvolutionOperation() = default;
    ConvolutionOperation(const ov::OutputVector& inputs, const ConvolutionOperation& like)
        : Op(inputs),
          groups_(like.groups_),
          eps_(like.eps_),
          planes_(like.planes_),
          added_at_(like.added_at_),
          times_(like.times_),
          stride_(like.stride_),
          tile_(like.tile_),
          in_halves_(like.in_halves_),
          holds_weights_(like.holds_weights_) {
        if (holds_weights_) weights_ = like.weights_;
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const ov::Shape& pixels = get_input_shape(0);
        OPENVINO_ASSERT((times_ == 1 || times_ == 2) && (stride_ == 1 || (stride_ == 2 && times_ == 1)),
                        "strides and times are 1 or 2");
        const size_t planes = planes_ > 0 ? planes_ : out_channels(weight_shape());
        const ov::Shape out{pixels[0], planes, out_side(pixels[2]), out_side(pixels[3])};
        check(out);
        set_output_type(0, get_input_element_type(0), out);
        if (holds_weights_ && weights_.packed == nullptr)
            weights_ = hold_weights(*this, 1, [this](const ov::Tensor& weight) { return pack(weight); });
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<ConvolutionOperation>(inputs, *this);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("groups", groups_);
        visitor.on_attribute("eps", eps_);
        visitor.on_attribute("planes", planes_);
        visitor.on_attribute("added_at", added_at_);
        visitor.on_attribute("times", times_);
        visitor.on_attribute("stride", stride_);
        visitor.on_attribute("tile", tile_);
        visitor.on_attribute("in_halves", in_halves_);
        visitor.on_attribute("holds_weights", holds_weights_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        std::call_once(once_, [&] {
            bias_ = numbers(inputs[2]);
            if (is_normed(num_inputs())) norm_ = {numbers(inputs[norm_at()]), numbers(inputs[norm_at() + 1])};
            if (!holds_weights_) weights_ = pack(inputs[1]);
        });
        if (tile_ == 0)
            convolve_windows(outputs[0], inputs);
        else
            convolve_in_tiles(outputs[0], inputs);
        return true;
    }

private:
    // Returns the bias plus what is added to it, valid until this thread's next call.
    const float* bias(const ov::TensorVector& inputs) const {
        if (added_at_ < 0) return bias_.data();
        static thread_local Numbers sums;
        sums = bias_;
        const float* added = inputs[3].data<float>() + added_at_;
        for (float& sum : sums) sum += *added++;
        return sums.data();
    }

    void convolve_in_tiles(ov::Tensor& out, const ov::TensorVector& inputs) const {
        const ov::Shape &pixels = inputs[0].get_shape(), &shape = out.get_shape();
        Convolution call{};
        call.input = inputs[0].data<float>();
        call.packed = weights_.packed.get();
        call.bias = bias(inputs);
        call.residual = has_residual(num_inputs()) ? inputs.back().data<float>() : nullptr;
        call.out = out.data<float>();
        call.frames = size(pixels[0]), call.in_planes = size(pixels[1]), call.out_planes = size(shape[1]);
        call.in_channels = size(weights_.shape[1]), call.out_channels = size(weights_.shape[0]);
        call.height = size(shape[2]), call.width = size(shape[3]), call.times = size(times_);
        call.tile = size(tile_), call.in_halves = in_halves_;
        if (is_normed(num_inputs())) {
            const PlaneScales scales = group_norm_of(inputs[0], norm_, groups_, eps_);
            call.scale = scales.scale, call.shift = scales.shift;
        }
        winograd_convolve(call, num_threads(), parallel);
    }

    void convolve_windows(ov::Tensor& out, const ov::TensorVector& inputs) const {
        const ov::Shape &pixels = inputs[0].get_shape(), &shape = out.get_shape();
        WindowConvolution call{};
        call.picture.input = inputs[0].data<float>();
        call.picture.frames = size(pixels[0]), call.picture.channels = size(pixels[1]);
        call.picture.height = size(pixels[2]), call.picture.width = size(pixels[3]);
        if (is_normed(num_inputs())) {
            call.picture.weight = norm_.weight.data(), call.picture.bias = norm_.bias.data();
            call.picture.groups = size(groups_), call.picture.eps = eps_;
        }
        call.window = {size(stride_), size(times_), size(shape[2]), size(shape[3])};
        call.packed = weights_.packed.get();
        call.bias = bias(inputs);
        call.residual = has_residual(num_inputs()) ? inputs.back().data<float>() : nullptr;
        call.out = out.data<float>();
        call.out_channels = size(out_channels(weights_.shape)), call.planes = size(shape[1]);
#ifdef PC_HAS_TILES
        if (in_halves_ && may_use_tiles()) return posecrafter::convolve_windows<Digits>(call, num_threads(), parallel);
#endif
#ifdef PC_HAS_VNNI
        if (in_halves_) return posecrafter::convolve_windows<Words>(call, num_threads(), parallel);
        posecrafter::convolve_windows<Bytes>(call, num_threads(), parallel);
#endif
    }

    void check(const ov::Shape& out) const {
        const ov::Shape &pixels = get_input_shape(0), &weight = weight_shape();
        const size_t inputs = num_inputs(), groups = static_cast<size_t>(groups_);
        OPENVINO_ASSERT((tile_ == 0 && kHasBytes) || ((tile_ == 2 || tile_ == 4) && stride_ == 1),
                        "tiles are of 2×2 or 4×4, or there are none, on a processor with VNNI");
        OPENVINO_ASSERT(tile_ <= 2 || !in_halves_, "halves are for tiles of 2×2, or none");
        const size_t channels = out_channels(weight);
        const bool is_few = tile_ > 0 && pixels[1] < kLanes && !is_normed(inputs);
        const size_t in = is_few ? kLanes : pixels[1];
        const ov::Shape fitting = is_transposed() ? ov::Shape{in, channels, 4, 4} : ov::Shape{channels, in, 3, 3};
        OPENVINO_ASSERT(weight == fitting, "weights that do not fit");
        OPENVINO_ASSERT(in % kLanes == 0 && channels % kPanel == 0 && out[1] + kPanel > channels && out[1] <= channels,
                        "channels come in whole vectors and panels");
        OPENVINO_ASSERT(ov::shape_size(get_input_shape(2)) == channels, "a bias that does not fit");
        OPENVINO_ASSERT(inputs >= 3 && inputs <= 6, "inputs that do not fit");
        OPENVINO_ASSERT(added_at_ < 0 || added_at_ + channels <= ov::shape_size(get_input_shape(3)),
                        "what is added to the bias does not fit");
        for (size_t norm = norm_at(); is_normed(inputs) && norm < norm_at() + 2; ++norm)
            OPENVINO_ASSERT(
                (groups == 0 || pixels[1] % groups == 0) && ov::shape_size(get_input_shape(norm)) == pixels[1],
                "a norm that does not fit");
        OPENVINO_ASSERT(!has_residual(inputs) || get_input_shape(get_input_size() - 1) == out,
                        "a residual of another shape");
    }

    const ov::Shape& weight_shape() const { return weights_.packed == nullptr ? get_input_shape(1) : weights_.shape; }

    Weights pack(const ov::Tensor& weight) const {
        if (tile_ > 0) return in_halves_ ? pack_tiles<Half>(weight) : pack_tiles<float>(weight);
#ifdef PC_HAS_TILES
        if (in_halves_ && may_use_tiles()) return pack_format<Digits>(weight);
#endif
#ifdef PC_HAS_VNNI
        return in_halves_ ? pack_format<Words>(weight) : pack_format<Bytes>(weight);
#else
        return {};
#endif
    }

    bool is_transposed() const { return tile_ == 0 && times_ == 2; }

    size_t out_channels(const ov::Shape& weight) const { return weight[is_transposed() ? 1 : 0]; }

    template <class Format>
    Weights pack_format(const ov::Tensor& weight) const {
        const ov::Shape& shape = weight.get_shape();
        const int times = size(times_), rows = size(out_channels(shape)),
                  columns = size(shape[is_transposed() ? 0 : 1]);
        return packed_weights<Format>(
            weight, columns, times == 2 ? kDoubledInFormat : kInFormat, packed_windows<Format>(times, columns, rows),
            [&](float* to) { pack_windows<Format>(weight.data<float>(), columns, rows, times, to, parallel); });
    }

    template <class Number>
    Weights pack_tiles(const ov::Tensor& weight) const {
        const size_t out = weight.get_shape()[0], in = weight.get_shape()[1];
        const int tile = size(tile_);
        const size_t floats = winograd_products(tile) * in * out * sizeof(Number) / sizeof(float);
        return packed_weights<Number>(weight, in, tile, floats, [&](float* to) {
            winograd_pack(weight.data<float>(), size(in), size(out), tile, reinterpret_cast<Number*>(to), parallel);
        });
    }

    size_t out_side(size_t side) const { return (side * times_ + stride_ - 1) / stride_; }

    // The index of the norm's weight, and the number of inputs without the one added to the bias.
    size_t norm_at() const { return added_at_ < 0 ? 3 : 4; }
    size_t num_inputs() const { return get_input_size() + 3 - norm_at(); }

    static bool is_normed(size_t num_inputs) { return num_inputs >= 5; }

    static int size(size_t value) { return static_cast<int>(value); }

    int64_t groups_ = 0;
    double eps_ = 0;
    int64_t planes_ = 0;
    int64_t added_at_ = -1;
    int64_t times_ = 1;
    int64_t stride_ = 1;
    int64_t tile_ = 4;
    bool in_halves_ = false;
    bool holds_weights_ = false;
    mutable std::once_flag once_;
    mutable Weights weights_;
    mutable Numbers bias_;
    mutable Norm norm_;
};

}  // namespace posecrafter
