// Memory that the operations take. Layer 4.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <utility>

namespace posecrafter {

// Memory for `count` floats, in large pages where the system has them, for products stream through weights. Released by
// std::free. Throws std::bad_alloc.
float* allocate_floats(size_t count);

// Of weights that have been packed: lets go of the pages that they lie in, if those are a file's that was told of by
// posecrafter_pack_from. Until the last are packed all would be in memory otherwise, beside what is made of them.
void let_go_of_packed(const void* weights);

// Memory of one thread that grows to what its calls need, and stays: pages that are new at every call cost as much as a
// phase.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    float* take(size_t count) {
        if (count > count_) {
            std::free(std::exchange(memory_, nullptr));
            count_ = 0;
            memory_ = allocate_floats(count);
            count_ = count;
        }
        return memory_;
    }

private:
    float* memory_ = nullptr;
    size_t count_ = 0;
};

}  // namespace posecrafter
