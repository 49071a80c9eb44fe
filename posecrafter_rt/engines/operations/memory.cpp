// Memory in large pages. Layer 4.
#include "memory.h"

#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace posecrafter {

constexpr size_t kLargePage = 1 << 21;

float* allocate_floats(size_t count) {
    const size_t page = count * sizeof(float) < kLargePage ? 64 : kLargePage;
    const size_t bytes = (count * sizeof(float) + page - 1) / page * page;
    void* memory = std::aligned_alloc(page, bytes);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == kLargePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<float*>(memory);
}

}  // namespace posecrafter
