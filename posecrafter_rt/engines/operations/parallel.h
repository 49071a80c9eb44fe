// What every operation here asks of whoever calls it: threads; and the memory that it takes itself. Layer 4.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <functional>
#include <new>

namespace posecrafter {

// Calls task(i) for every i in 0 … count-1 on whatever threads there are, and returns when all are done.
using Parallel = std::function<void(int count, const std::function<void(int)>& task)>;

// Memory for `count` floats, in large pages where the system has them, for products stream through weights. Released by
// std::free. nullptr: out of memory.
float* allocate_floats(size_t count);

// Memory of one thread that grows to what its calls need, and stays: pages that are new at every call cost as much as a
// phase.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    float* take(size_t count) {
        if (count > count_) {
            std::free(memory_);
            memory_ = allocate_floats(count);
            count_ = memory_ == nullptr ? 0 : count;
            if (memory_ == nullptr) throw std::bad_alloc();
        }
        return memory_;
    }

private:
    float* memory_ = nullptr;
    size_t count_ = 0;
};

constexpr int ceil_div(int count, int by) { return (count + by - 1) / by; }

}  // namespace posecrafter
