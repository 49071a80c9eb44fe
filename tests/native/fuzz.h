// What fuzz_operations.cpp draws its calls by, runs them on and judges them by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace fuzz {

inline std::mt19937_64 generator;
inline int num_workers = 1;

inline int pick(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

inline bool flip() { return pick(0, 1) == 1; }

inline std::vector<float> draw(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(generator);
    return values;
}

inline void parallel(int count, const std::function<void(int)>& task) {
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    if (flip()) std::shuffle(order.begin(), order.end(), generator);
    const auto work = [&](int worker) {
        for (int i = worker; i < count; i += num_workers) task(order[i]);
    };
    std::vector<std::thread> others;
    for (int worker = 1; worker < num_workers; ++worker) others.emplace_back(work, worker);
    work(0);  // this thread goes on to the next call, with what it keeps
    for (std::thread& other : others) other.join();
}

using Packed = std::unique_ptr<float, decltype(&std::free)>;

// An exact block, which `allocate_floats` rounds up.
inline Packed block(size_t count) {
    const size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
    return {static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free};
}

// Whether what was found at some places is what it should be, and something is everywhere.
class Judge {
public:
    explicit Judge(const std::vector<float>& out) : out_(out) {
        for (float value : out) is_whole_ = is_whole_ && !std::isnan(value);
    }

    void expect(size_t at, double value) {
        worst_ = std::max(worst_, std::fabs(value - out_[at]));
        largest_ = std::max(largest_, std::fabs(value));
    }

    bool passes(double tolerance) const { return is_whole_ && worst_ <= tolerance * (largest_ + 1); }

private:
    const std::vector<float>& out_;
    bool is_whole_ = true;
    double worst_ = 0, largest_ = 0;
};

}  // namespace fuzz
