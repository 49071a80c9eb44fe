// Imports DLPack capsules: takes each over once, releases it once, and checks it before use.
// Layer 2: see array.h.
#include "array.h"

#include <iterator>
#include <limits>
#include <stdexcept>

namespace py = pybind11;

namespace posecrafter {
namespace {

using dlpack::DeviceType;
using dlpack::TypeCode;

constexpr char kUnversioned[] = "dltensor", kVersioned[] = "dltensor_versioned";
constexpr char kUsedUnversioned[] = "used_dltensor", kUsedVersioned[] = "used_dltensor_versioned";
constexpr int kMaxDims = 8;

template <typename Managed>
void call_deleter(void* managed) {
    auto* self = static_cast<Managed*>(managed);
    if (self->deleter != nullptr) self->deleter(self);
}

// Asks an exporter for its capsule. Exporters from before versioned DLPack do not know the keyword max_version.
py::object export_capsule(py::handle object, const py::dict& options) {
    const py::object exporter = object.attr("__dlpack__");
    py::dict versioned(**options);
    versioned["max_version"] = py::make_tuple(dlpack::kMajor, 0);
    try {
        return exporter(**versioned);
    } catch (const py::error_already_set& error) {
        if (!error.matches(PyExc_TypeError)) throw;
    }
    return exporter(**options);
}

// A CUDA exporter orders its work before the importer's stream; DLPack calls the default one 1. Others take no stream.
py::dict stream_options(py::handle object, uintptr_t stream) {
    py::dict options;
    if (!py::hasattr(object, "__dlpack_device__")) return options;
    const auto device = object.attr("__dlpack_device__")().cast<py::tuple>();
    if (static_cast<DeviceType>(device[0].cast<int>()) == DeviceType::cuda) options["stream"] = stream ? stream : 1;
    return options;
}

}  // namespace

Array::Array(const char* name, py::handle object, uintptr_t stream) : name_(name), owner_(nullptr, nullptr) {
    if (PyCapsule_CheckExact(object.ptr())) {
        import_capsule(object);
    } else if (py::hasattr(object, "__dlpack__")) {
        try {
            const py::object capsule = export_capsule(object, stream_options(object, stream));
            if (!PyCapsule_CheckExact(capsule.ptr())) throw py::type_error(name_ + std::string(": no capsule came"));
            import_capsule(capsule);
        } catch (const py::error_already_set& error) {  // the standard's error for an array that cannot be exported
            if (!error.matches(PyExc_BufferError)) throw;
            throw std::invalid_argument(name_ + std::string(": ") + py::str(error.value()).cast<std::string>());
        }
    } else {
        const auto type = py::type::handle_of(object).attr("__name__").cast<std::string>();
        throw py::type_error(name_ + std::string(": ") + type + " is no array: it has no __dlpack__");
    }
    check_layout();
}

void Array::import_capsule(py::handle capsule) {
    const char* label = PyCapsule_GetName(capsule.ptr());
    const std::string found = label == nullptr ? "(none)" : label;
    if (found == kUnversioned) {
        auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kUnversioned));
        PyCapsule_SetName(capsule.ptr(), kUsedUnversioned);  // from here on we must delete it
        owner_ = Owner(managed, call_deleter<dlpack::ManagedTensor>);
        tensor_ = &managed->tensor;
    } else if (found == kVersioned) {
        auto* managed = static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule.ptr(), kVersioned));
        PyCapsule_SetName(capsule.ptr(), kUsedVersioned);
        owner_ = Owner(managed, call_deleter<dlpack::ManagedTensorVersioned>);
        if (managed->version.major != dlpack::kMajor)  // then only the deleter may be read
            throw std::invalid_argument(name_ + std::string(": DLPack version ") +
                                        std::to_string(managed->version.major) + " is not known here");
        tensor_ = &managed->tensor;
        is_read_only_ = (managed->flags & dlpack::kReadOnlyFlag) != 0;
    } else if (found == kUsedUnversioned || found == kUsedVersioned) {
        throw std::invalid_argument(name_ + std::string(": the capsule was used before"));
    } else {
        throw std::invalid_argument(name_ + std::string(": a capsule named ") + found + " is no DLPack tensor");
    }
}

void Array::check_layout() {
    const dlpack::Tensor& t = *tensor_;
    const auto fail = [&](const char* reason) { throw std::invalid_argument(name_ + std::string(": ") + reason); };
    if (t.ndim < 0 || t.ndim > kMaxDims || (t.ndim > 0 && t.shape == nullptr)) fail("a broken shape");
    if (t.dtype.lanes != 1 || t.dtype.bits == 0 || t.dtype.bits % 8 != 0) fail("elements that are no whole numbers");
    bool is_empty = false;
    for (int axis = 0; axis < t.ndim; ++axis) {
        if (t.shape[axis] < 0) fail("a negative size");
        is_empty |= t.shape[axis] == 0;
    }
    if (is_empty) return;
    const int64_t item = t.dtype.bits / 8;
    int64_t count = 1;
    for (int axis = t.ndim - 1; axis >= 0; --axis) {
        const bool is_compact = t.strides == nullptr || t.shape[axis] == 1 || t.strides[axis] == count;
        if (!is_compact) refuse("rows must be contiguous: pass a contiguous copy");
        if (t.shape[axis] > std::numeric_limits<int64_t>::max() / item / count) fail("more bytes than there can be");
        count *= t.shape[axis];
    }
    num_bytes_ = count * item;
    if (t.data == nullptr) fail("null data");
    data_ = static_cast<char*>(t.data) + t.byte_offset;
    if (reinterpret_cast<uintptr_t>(data_) % item != 0) fail("data that is not aligned to its elements");
}

bool Array::is_on_cpu() const { return device().type == DeviceType::cpu || device().type == DeviceType::cuda_host; }

bool Array::has_type(TypeCode code, int bits) const {
    return tensor_->dtype.code == code && tensor_->dtype.bits == bits;
}

bool Array::has_type_of(const Array& other) const {
    return has_type(other.tensor_->dtype.code, other.tensor_->dtype.bits);
}

bool Array::overlaps(const Array& other) const {
    const auto begin = reinterpret_cast<uintptr_t>(data_), other_begin = reinterpret_cast<uintptr_t>(other.data_);
    return begin < other_begin + other.num_bytes_ && other_begin < begin + num_bytes_;
}

void Array::want_sizes(const char* form, int axis, std::initializer_list<int64_t> sizes) const {
    const bool fits = ndim() == axis + static_cast<int>(sizes.size());
    for (int64_t wanted : sizes)
        if (!fits || size(axis++) != wanted) refuse(std::string("want sizes ") + form);
}

void Array::refuse(const std::string& reason) const {
    throw std::invalid_argument(name_ + std::string(": ") + reason + "; it is " + describe());
}

std::string Array::describe() const {
    constexpr const char* kTypes[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    const auto code = static_cast<size_t>(tensor_->dtype.code);
    std::string text = code < std::size(kTypes) ? kTypes[code] : "type " + std::to_string(code) + ", bits ";
    text += std::to_string(tensor_->dtype.bits) + " (";
    for (int axis = 0; axis < ndim(); ++axis) text += (axis ? ", " : "") + std::to_string(size(axis));
    const bool is_cuda = device().type == DeviceType::cuda;
    const std::string other = "device type " + std::to_string(static_cast<int>(device().type));
    return text + ") on " + (is_on_cpu() ? "cpu" : is_cuda ? "cuda:" + std::to_string(device().index) : other);
}

}  // namespace posecrafter
