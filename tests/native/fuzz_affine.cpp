// Fuzzes affine_warp_paste_cpu under ASan and UBSan: bad rectangles, singular and NaN affines, empty regions, odd and
// large sizes. Usage: fuzz_affine SECONDS SEED. Buffers are exact heap blocks, so that a stray access is caught.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "affine_warp_paste.h"

using namespace posecrafter;

namespace {

std::mt19937_64 generator;

int64_t pick(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(generator); }

float random_entry() {
    const float odd[] = {0.0f,
                         -0.0f,
                         1.0f,
                         -1.0f,
                         1e-45f,
                         -1e-30f,
                         1e30f,
                         std::numeric_limits<float>::max(),
                         std::numeric_limits<float>::infinity(),
                         -std::numeric_limits<float>::infinity(),
                         std::numeric_limits<float>::quiet_NaN()};
    if (pick(0, 9) == 0) return odd[pick(0, 10)];
    return std::normal_distribution<float>(0.0f, 2.0f)(generator);
}

std::vector<float> random_affines(int64_t count, int size) {
    std::vector<float> affines(count * 6);
    for (int64_t i = 0; i < count; ++i) {
        float* a = &affines[i * 6];
        for (int j = 0; j < 6; ++j) a[j] = random_entry();
        if (pick(0, 2) != 0) {  // most near the identity, so that much is pasted
            for (int j : {0, 4}) a[j] = 1.0f + 0.2f * random_entry();
            for (int j : {1, 3}) a[j] = 0.2f * random_entry();
            for (int j : {2, 5}) a[j] *= static_cast<float>(size) / 8.0f;
        } else if (pick(0, 3) == 0) {  // singular: the second row is the first's multiple
            for (int j = 0; j < 3; ++j) a[3 + j] = 2.0f * a[j];
        }
    }
    return affines;
}

std::vector<int64_t> random_rects(int64_t count, int size) {
    const int64_t odd[] = {0, -1, INT64_MIN, INT64_MAX, int64_t{1} << 32, -(int64_t{1} << 31), size};
    std::vector<int64_t> rects(count * 4);
    for (int64_t& edge : rects) edge = pick(0, 4) == 0 ? odd[pick(0, 6)] : pick(-3, size + 3);
    return rects;
}

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "fuzz_affine: %s\n", what);
    std::exit(1);
}

// Every value must be the frame's own or lie within the source's range: resampling with convex weights makes no new
// ones.
template <typename T>
void check(const Params& p, const std::vector<T>& source, const std::vector<T>& out) {
    float least = INFINITY, most = -INFINITY;
    for (T value : source) {
        least = std::min(least, to_float(value));
        most = std::max(most, to_float(value));
    }
    const float slack = 1e-2f * (most - least);  // rounding of sixteen-bit values
    for (T value : out) {
        const float v = to_float(value);
        if (p.mode != Mode::unit_variance && !(v >= least - slack && v <= most + slack)) fail("a value out of range");
        if (!std::isfinite(v)) fail("a value that is not finite");
    }
    const int64_t size = static_cast<int64_t>(p.channels) * p.height * p.width;
    for (int64_t i = 0; p.copy && i < p.lead * size; ++i)
        if (to_float(out[i]) != to_float(source[i % source.size()])) fail("a leading frame was edited");
}

template <typename T>
void round_trip(Params p) {
    const int64_t size = static_cast<int64_t>(p.channels) * p.height * p.width;
    const bool is_shared = pick(0, 1) == 0;
    std::vector<T> source(is_shared ? size : size * p.frames);
    for (T& value : source) from_float(std::normal_distribution<float>()(generator), &value);
    const bool is_in_place = !is_shared && pick(0, 1) == 0;
    std::vector<T> out(size * p.frames);
    if (is_in_place) out = source;
    const int64_t edits = static_cast<int64_t>(std::max(0, p.frames - p.lead)) * p.regions;
    const auto affines = random_affines(edits, std::max(p.height, p.width));
    const auto rects = random_rects(edits, std::max(p.height, p.width));
    p.source = is_in_place ? out.data() : source.data();
    p.source_stride = is_shared ? 0 : size;
    p.out = out.data();
    p.affines = affines.data();
    p.rects = rects.data();
    p.copy = !is_in_place;
    affine_warp_paste_cpu(p, static_cast<int>(pick(1, 2)));
    check(p, source, out);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) fail("usage: fuzz_affine SECONDS SEED");
    generator.seed(std::strtoull(argv[2], nullptr, 10));
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
    int64_t rounds = 0;
    for (; rounds < 50 || std::chrono::steady_clock::now() < end; ++rounds) {
        Params p{};
        const bool is_long = pick(0, 9) == 0;  // longer than a run of taps, in either direction
        p.height = static_cast<int>(is_long && rounds % 2 ? pick(200, 3000) : pick(1, 70));
        p.width = static_cast<int>(is_long && rounds % 2 == 0 ? pick(200, 3000) : pick(1, 70));
        p.channels = static_cast<int>(pick(1, 5));
        p.lead = static_cast<int>(pick(0, 1));
        p.frames = p.lead + static_cast<int>(pick(0, 3));
        p.regions = static_cast<int>(pick(0, 4));
        p.mode = static_cast<Mode>(pick(0, 2));
        p.dtype = static_cast<DType>(pick(0, 2));
        if (p.dtype == DType::fp32) round_trip<float>(p);
        if (p.dtype == DType::fp16) round_trip<Half>(p);
        if (p.dtype == DType::bf16) round_trip<BFloat16>(p);
    }
    std::printf("%lld rounds\n", static_cast<long long>(rounds));
    return 0;
}
