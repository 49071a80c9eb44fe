// An array of any library, borrowed through DLPack for one call, and the checks that come before its memory is touched.
// Layer 2: knows Python and DLPack, no operator.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "dlpack.h"

namespace posecrafter {

// Holds the exporter's memory from construction to destruction (both with the GIL). Checked at construction: one lane,
// compact rows, aligned data, sizes that are not negative, fewer than 2⁶³ bytes, and no null data unless it is empty.
class Array {
public:
    // object: a DLPack capsule, which is used up, or anything with `__dlpack__`. name: the argument's name, for
    // messages. stream: the address of the stream before which the exporter orders its pending work; ignored on the
    // CPU.
    // Throws invalid_argument (ValueError) for a bad array, pybind11::type_error for anything that is not an array.
    Array(const char* name, pybind11::handle object, uintptr_t stream = 0);

    void* data() const { return data_; }
    int ndim() const { return tensor_->ndim; }
    int64_t size(int axis) const { return tensor_->shape[axis]; }
    int64_t num_bytes() const { return num_bytes_; }
    dlpack::Device device() const { return tensor_->device; }
    bool is_on_cpu() const;  // readable by the host: pinned memory too
    bool is_read_only() const { return is_read_only_; }
    bool has_type(dlpack::TypeCode code, int bits) const;
    bool has_type_of(const Array& other) const;
    bool overlaps(const Array& other) const;

    // Throws unless the sizes from `axis` on are exactly these. `form` names them in messages, such as "(N, R, 2, 3)".
    void want_sizes(const char* form, int axis, std::initializer_list<int64_t> sizes) const;
    [[noreturn]] void refuse(const std::string& reason) const;  // throws "name: reason; it is float32 (2, 3) on cpu"

private:
    using Owner = std::unique_ptr<void, void (*)(void*)>;

    void import_capsule(pybind11::handle capsule);
    void check_layout();
    std::string describe() const;

    const char* name_;
    Owner owner_;
    const dlpack::Tensor* tensor_ = nullptr;
    void* data_ = nullptr;
    int64_t num_bytes_ = 0;
    bool is_read_only_ = false;
};

}  // namespace posecrafter
