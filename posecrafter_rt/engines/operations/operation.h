// What the OpenVINO operations share: threads, and weights kept as a product reads them. Layer 4: compiled against the
// OpenVINO that is installed, by openvino_operations.py.
#pragma once

#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <openvino/core/except.hpp>
#include <string_view>
#include <tuple>

#include "parallel.h"

namespace posecrafter {

// OpenVINO's own threads: others would have to share the cores with them. A thread that waits here takes up no other
// work, which might be another operation that wants its scratch.
inline void parallel(int count, const std::function<void(int)>& task) {
    tbb::this_task_arena::isolate([&] { tbb::parallel_for(0, count, task); });
}

inline int num_threads() { return tbb::this_task_arena::max_concurrency(); }

// What tells packed weights from others: a hash of their bytes, input and output channels, and how they are packed.
using WeightsKey = std::tuple<size_t, size_t, size_t, int>;

// A layer's weights as pack(to) writes them, `count` floats: one copy for all input shapes, while one of them is used.
template <class Pack>
std::shared_ptr<float> packed_weights(const float* weight, size_t in, size_t out, size_t taps, int kind, size_t count,
                                      const Pack& pack) {
    static std::mutex mutex;
    static std::map<WeightsKey, std::weak_ptr<float>> known;
    const std::string_view bytes(reinterpret_cast<const char*>(weight), in * out * taps * sizeof(float));
    const WeightsKey key{std::hash<std::string_view>()(bytes), in, out, kind};
    const std::lock_guard<std::mutex> lock(mutex);
    if (std::shared_ptr<float> found = known[key].lock()) return found;
    const std::shared_ptr<float> packed(allocate_floats(count), std::free);
    OPENVINO_ASSERT(packed != nullptr, "out of memory: packed weights");
    pack(packed.get());
    known[key] = packed;
    return packed;
}

}  // namespace posecrafter
