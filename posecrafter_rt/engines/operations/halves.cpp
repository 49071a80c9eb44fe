// Numbers in 16 bits. Layer 4.
#include "halves.h"

namespace posecrafter {

namespace {

// Numbers from one row to the next: apart in the sets of the innermost cache.
size_t half_stride(int depth) {
    constexpr int kLine = 64 / sizeof(Half);
    return ceil_div(depth, kLine) * kLine + kLine;
}

}  // namespace

size_t half_rows_floats(int count, int depth) { return count * half_stride(depth) * sizeof(Half) / sizeof(float); }

HalfRows rows_to_halves(Rows rows, int count, int depth, float* memory) {
    const size_t stride = half_stride(depth);
    auto* halves = reinterpret_cast<Half*>(memory);
    const HalfRows made{halves, stride, depth, 1, 0};
    for (int r = 0; r < count; ++r, halves += stride) {
        const float* row = rows.first + r * rows.stride;
        int i = 0;
        for (; i + kLanes <= depth; i += kLanes) store(halves + i, load(row + i));
        if (i == depth) continue;
        Vector rest{};
        for (int k = i; k < depth; ++k) rest[k - i] = row[k];
        store(halves + i, rest);  // beyond the row there is room
    }
    return made;
}

}  // namespace posecrafter
