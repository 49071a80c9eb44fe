// The part of DLPack's binary interface that an importer of arrays needs, version 1 and the unversioned one before it.
// Layer 2: declarations only; field order and widths are the standard's (dmlc.github.io/dlpack), the names are ours.
#pragma once

#include <cstddef>
#include <cstdint>

namespace posecrafter::dlpack {

constexpr uint32_t kMajor = 1;         // a larger one may have another layout from `manager` on
constexpr uint64_t kReadOnlyFlag = 1;  // of ManagedTensorVersioned::flags

enum class DeviceType : int32_t { cpu = 1, cuda = 2, cuda_host = 3 };

struct Device {
    DeviceType type;
    int32_t index;
};

enum class TypeCode : uint8_t { integer = 0, floating = 2, bfloat = 4 };

struct DataType {
    TypeCode code;
    uint8_t bits;
    uint16_t lanes;  // 1 but for vectors
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;      // in elements; null: compact rows
    uint64_t byte_offset;  // from `data` to the first element
};

// What a capsule named `dltensor` holds. The importer calls `deleter`, if there is one, exactly once.
struct ManagedTensor {
    Tensor tensor;
    void* manager;
    void (*deleter)(ManagedTensor*);
};

struct Version {
    uint32_t major, minor;
};

// What a capsule named `dltensor_versioned` holds.
struct ManagedTensorVersioned {
    Version version;
    void* manager;
    void (*deleter)(ManagedTensorVersioned*);
    uint64_t flags;
    Tensor tensor;
};

static_assert(sizeof(void*) != 8 || (sizeof(Tensor) == 48 && offsetof(Tensor, shape) == 24), "DLPack's layout");
static_assert(sizeof(void*) != 8 || offsetof(ManagedTensorVersioned, tensor) == 32, "DLPack's layout");

}  // namespace posecrafter::dlpack
