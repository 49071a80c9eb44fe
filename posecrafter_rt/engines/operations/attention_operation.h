// The OpenVINO operation posecrafter::Attention: query, key, value → softmax(query · keyᵀ / √width) · value for each of
// `heads` heads of `width` channels. Tokens (N, n, C) attend to those of their picture, (N, m, C); tokens (N, F, n, C)
// attend to the same ones in some frames, (N, K, n, C). More inputs and attributes:
// - a boolean mask (N, K): only keys for which it is true take part;
// - has_own: after the mask, which is then (N, K + 1), an input (N, 1, n, C) that is the last key and value. Its
//   channels begin where those of the others do;
// - query_at, key_at, value_at: where the channels begin in wider inputs;
// - in_bytes: products are in 8 and 16 bits;
// - in_halves: products are of pairs of 16-bit floats, if the processor has tiles.
// Layer 4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <openvino/op/op.hpp>

#include "attention.h"
#include "bytes.h"
#include "operation.h"

namespace posecrafter {

class AttentionOperation : public ov::op::Op {
public:
    OPENVINO_OP("Attention", "posecrafter");

    AttentionOperation() = default;
    AttentionOperation(const ov::OutputVector& inputs, const AttentionOperation& like)
        : Op(inputs),
          heads_(like.heads_),
          width_(like.width_),
          query_at_(like.query_at_),
          key_at_(like.key_at_),
          value_at_(like.value_at_),
          has_own_(like.has_own_),
          in_bytes_(like.in_bytes_),
          in_halves_(like.in_halves_) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const size_t inputs = get_input_size();
        OPENVINO_ASSERT(has_own_ ? inputs == 5 : inputs == 3 || inputs == 4, "no query, key and value");
        const ov::Shape &query = get_input_shape(0), &key = get_input_shape(1), &value = get_input_shape(2);
        OPENVINO_ASSERT(heads_ > 0 && width_ > 0 && (query.size() == 3 || query.size() == 4), "no tokens of heads");
        OPENVINO_ASSERT(key.size() == query.size() && value.size() == query.size() && key[1] > 0, "no keys of these");
        OPENVINO_ASSERT(fits(0, query_at_) && fits(1, key_at_) && fits(2, value_at_), "channels that are not there");
        for (size_t axis = 0; axis + 1 < query.size(); ++axis) {
            OPENVINO_ASSERT(axis == 1 || query[axis] == key[axis], "keys of other pictures");
            OPENVINO_ASSERT(key[axis] == value[axis], "a key without a value");
        }
        OPENVINO_ASSERT(!in_bytes_ || (kHasBytes && width_ % kFour == 0), "what eight bits do not serve");
        OPENVINO_ASSERT(!in_bytes_ || !in_halves_, "products in both 8 and 16 bits");
        if (inputs > 3)  // OpenVINO turns booleans into bytes
            OPENVINO_ASSERT(get_input_element_type(3).size() == 1 &&
                                get_input_shape(3) == ov::Shape({key[0], key[1] + (has_own_ ? 1 : 0)}),
                            "a mask of other keys");
        if (has_own_)
            OPENVINO_ASSERT(query.size() == 4 && get_input_shape(4).size() == 4 && fits(4, key_at_) &&
                                fits(4, value_at_) && get_input_shape(4)[0] == key[0] && get_input_shape(4)[1] == 1 &&
                                get_input_shape(4)[2] == key[2],
                            "a key of another picture");
        ov::Shape out = query;
        out.back() = channels();
        set_output_type(0, get_input_element_type(0), out);
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<AttentionOperation>(inputs, *this);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("heads", heads_);
        visitor.on_attribute("width", width_);
        visitor.on_attribute("query_at", query_at_);
        visitor.on_attribute("key_at", key_at_);
        visitor.on_attribute("value_at", value_at_);
        visitor.on_attribute("has_own", has_own_);
        visitor.on_attribute("in_bytes", in_bytes_);
        visitor.on_attribute("in_halves", in_halves_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Shape &query = inputs[0].get_shape(), &key = inputs[1].get_shape();
        Attention call{};
        call.query = tokens(inputs[0], query_at_);
        call.key = tokens(inputs[1], key_at_);
        call.value = tokens(inputs[2], value_at_);
        call.mask = inputs.size() > 3 ? static_cast<const char*>(inputs[3].data()) : nullptr;
        call.out = outputs[0].data<float>();
        call.batch = static_cast<int>(query[0]), call.queries = static_cast<int>(query[1]);
        if (has_own_) call.own_key = tokens(inputs[4], key_at_), call.own_value = tokens(inputs[4], value_at_);
        call.keys = static_cast<int>(key[1]) + (has_own_ ? 1 : 0),
        call.places = query.size() == 4 ? static_cast<int>(query[2]) : 1;
        call.heads = static_cast<int>(heads_), call.width = static_cast<int>(width_);
        attend()(call, num_threads(), parallel);
        return true;
    }

private:
    auto attend() const -> void (*)(const Attention&, int, const Parallel&) {
#ifdef PC_HAS_VNNI
        if (in_bytes_) return attention_bytes;
#endif
#ifdef PC_HAS_TILES
        if (in_halves_) return attention_pairs;
#endif
        return attention;
    }

    size_t channels() const { return static_cast<size_t>(heads_ * width_); }

    bool fits(size_t index, int64_t at) const {
        const bool is_there = at >= 0 && static_cast<size_t>(at) + channels() <= get_input_shape(index).back();
        return is_there && get_input_element_type(index) == ov::element::f32;
    }

    static Tokens tokens(const ov::Tensor& tensor, int64_t at) {
        return {tensor.data<float>() + at, tensor.get_shape().back()};
    }

    int64_t heads_ = 0;
    int64_t width_ = 0;
    int64_t query_at_ = 0;
    int64_t key_at_ = 0;
    int64_t value_at_ = 0;
    bool has_own_ = false;
    bool in_bytes_ = false;
    bool in_halves_ = false;
};

}  // namespace posecrafter
