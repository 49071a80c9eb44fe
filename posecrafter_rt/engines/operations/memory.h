// Memory for the operations. Layer 4.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <utility>

namespace posecrafter {

// Allocates `count` floats, in large pages if the system has them, because products stream through weights. Free it
// with std::free. Throws std::bad_alloc.
float* allocate_floats(size_t count);

// Releases the pages of the mapped file in which packed weights lie, if posecrafter_pack_from has announced that file.
// Otherwise all its pages would stay in memory beside the packed weights until the last are packed.
void let_go_of_packed(const void* weights);

// Memory of one thread. It grows to what calls need, and stays, because new pages at every call cost as much as a
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
