// Memory in large pages, and the pages of mapped files. Layer 4.
#include "memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

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

namespace {

// A file's bytes, mapped for reading: they can be read again at any time.
struct Mapped {
    char* first;
    size_t bytes;
};

std::mutex mapped_mutex;
std::vector<Mapped> all_mapped;

}  // namespace

void let_go_of_packed(const void* weights) {
#ifdef MADV_DONTNEED
    const std::lock_guard<std::mutex> lock(mapped_mutex);
    for (const Mapped& mapped : all_mapped) {
        const char* const place = static_cast<const char*>(weights);
        // Releases the whole file, because the system reads megabytes when one page is asked for.
        if (place >= mapped.first && place < mapped.first + mapped.bytes)
            madvise(mapped.first, mapped.bytes, MADV_DONTNEED);
    }
#endif
}

}  // namespace posecrafter

// openvino_operations.py calls these before and after a network's first run. They say where the file lies from which
// weights are packed. Nothing may have been written there.
extern "C" __attribute__((visibility("default"))) void posecrafter_pack_from(char* first, size_t bytes) {
    const std::lock_guard<std::mutex> lock(posecrafter::mapped_mutex);
    posecrafter::all_mapped.push_back({first, bytes});
}

extern "C" __attribute__((visibility("default"))) void posecrafter_packed_from(const char* first) {
    const std::lock_guard<std::mutex> lock(posecrafter::mapped_mutex);
    auto& all = posecrafter::all_mapped;
    const auto found = std::find_if(all.begin(), all.end(), [=](const auto& mapped) { return mapped.first == first; });
    if (found != all.end()) all.erase(found);
}
