// The threads that every operation here gets from its caller. Layer 4.
#pragma once

#include <functional>

namespace posecrafter {

// Calls task(i) for every i in 0 … count-1 on whatever threads there are, and returns when all are done.
using Parallel = std::function<void(int count, const std::function<void(int)>& task)>;

// Runs all tasks on the calling thread, one after the other.
inline void alone(int count, const std::function<void(int)>& task) {
    for (int i = 0; i < count; ++i) task(i);
}

constexpr int ceil_div(int count, int by) { return (count + by - 1) / by; }

}  // namespace posecrafter
