// Fuzzes the operations of engines/operations/ under ASan and UBSan, against sums in double: odd sizes, more threads
// asked for than tasks, tasks in any order, threads that go from one call to the next. Usage: fuzz_operations SECONDS
// SEED. Buffers are exact heap blocks, so that a stray access is caught, and outputs begin as NaN.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "linear.h"
#include "products.h"
#include "winograd.h"

using namespace posecrafter;

namespace {

std::mt19937_64 generator;
int num_workers = 1;

int pick(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

bool flip() { return pick(0, 1) == 1; }

std::vector<float> draw(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(generator);
    return values;
}

void parallel(int count, const std::function<void(int)>& task) {
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
Packed block(size_t count) {
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

// One layer's weights and what they give, in double.
struct Drawn {
    int in, rows;
    std::vector<float> weight = draw(static_cast<size_t>(rows) * in), bias = draw(rows);
    Packed packed = block(weight.size());

    Drawn(int in_channels, int out_rows) : in(in_channels), rows(out_rows) {
        linear_pack(weight.data(), in, rows, packed.get(), parallel);
    }

    template <class Input>
    double at(int row, const Input& input) const {
        double sum = bias[row];
        for (int k = 0; k < in; ++k) sum += double{weight[static_cast<size_t>(row) * in + k]} * input(k);
        return sum;
    }
};

double gelu_of(double x) { return x * 0.5 * std::erfc(-x / std::sqrt(2.0)); }

bool fuzz_linear() {
    Linear call{};
    call.frames = pick(1, 6), call.size = pick(0, 3) != 0 ? pick(1, 60) : pick(1, 500);
    call.from_planes = flip(), call.to_planes = flip(), call.is_gated = flip();
    const bool has_next = call.is_gated && flip();
    const int plain = pick(0, 5) != 0 ? pick(1, 100) : (flip() ? 1024 : pick(500, 1100));
    const int in = call.from_planes ? kLanes * pick(1, pick(0, 4) != 0 ? 6 : 70) : plain;
    const int middle = kPanel * pick(1, has_next && pick(0, 2) == 0 ? 40 : 5);
    const int out_channels = has_next ? kPanel * pick(1, 4) : middle;
    const Drawn first(in, middle * (call.is_gated ? 2 : 1)), next(middle, out_channels);
    const size_t tokens = static_cast<size_t>(call.frames) * call.size;
    const std::vector<float> input = draw(tokens * in), residual = draw(tokens * out_channels);
    std::vector<float> out(tokens * out_channels, NAN);
    call.input = input.data(), call.out = out.data(), call.residual = flip() ? residual.data() : nullptr;
    call.layer = {first.packed.get(), first.bias.data(), in, middle};
    if (has_next) call.next = {next.packed.get(), next.bias.data(), middle, out_channels};
    linear(call, pick(1, flip() ? 4 : 40), parallel);

    Judge judge(out);
    const auto index = [&](bool is_planes, int frame, int token, int channel, int channels) {
        const size_t before = static_cast<size_t>(frame);
        return is_planes ? (before * channels + channel) * call.size + token
                         : (before * call.size + token) * channels + channel;
    };
    for (int trial = 0; trial < (has_next ? 12 : 60); ++trial) {
        const int frame = trial == 0 ? call.frames - 1 : pick(0, call.frames - 1);
        const int token = trial == 0 ? call.size - 1 : pick(0, call.size - 1), channel = pick(0, out_channels - 1);
        const auto given = [&](int k) { return input[index(call.from_planes, frame, token, k, in)]; };
        const auto layer = [&](int row) {
            return call.is_gated ? first.at(row, given) * gelu_of(first.at(row + middle, given)) : first.at(row, given);
        };
        const size_t at = index(call.to_planes, frame, token, channel, out_channels);
        judge.expect(
            at, (has_next ? next.at(channel, layer) : layer(channel)) + (call.residual == nullptr ? 0 : residual[at]));
    }
    return judge.passes(1e-5);
}

bool fuzz_winograd() {
    Convolution call{};
    call.times = pick(1, 2), call.tile = flip() ? 2 : 4, call.frames = pick(1, 4);
    const int height = pick(1, pick(0, 3) != 0 ? 12 : 60), width = pick(1, pick(0, 3) != 0 ? 20 : 90);
    call.height = call.times * height, call.width = call.times * width;
    call.in_channels = kLanes * pick(1, 3), call.out_channels = kPanel * pick(1, 2);
    const int in = call.in_channels, out_channels = call.out_channels;
    const size_t planes = static_cast<size_t>(call.frames) * in;
    const size_t count = static_cast<size_t>(call.frames) * out_channels * call.height * call.width;
    const std::vector<float> input = draw(planes * height * width), scale = draw(planes), shift = draw(planes);
    const std::vector<float> weight = draw(static_cast<size_t>(out_channels) * in * 9), bias = draw(out_channels);
    const std::vector<float> residual = draw(count);
    std::vector<float> out(count, NAN);
    const Packed packed = block(static_cast<size_t>(winograd_products(call.tile)) * in * out_channels);
    winograd_pack(weight.data(), in, out_channels, call.tile, packed.get(), parallel);
    call.input = input.data(), call.packed = packed.get(), call.bias = bias.data(), call.out = out.data();
    if (flip()) call.scale = scale.data(), call.shift = shift.data();
    if (flip()) call.residual = residual.data();
    winograd_convolve(call, pick(1, flip() ? 4 : 40), parallel);

    Judge judge(out);
    const auto pixel = [&](int frame, int k, int y, int x) {
        if (y < 0 || x < 0 || y >= call.height || x >= call.width) return 0.0;
        const size_t plane = static_cast<size_t>(frame) * in + k;
        const double value = input[(plane * height + y / call.times) * width + x / call.times];
        if (call.scale == nullptr) return value;
        const double normed = value * scale[plane] + shift[plane];
        return normed / (1 + std::exp(-normed));
    };
    for (int trial = 0; trial < 150; ++trial) {
        const int frame = pick(0, call.frames - 1), channel = pick(0, out_channels - 1);
        const int y = pick(0, call.height - 1), x = pick(0, call.width - 1);
        double value = bias[channel];
        for (int k = 0; k < in; ++k)
            for (int tap = 0; tap < 9; ++tap)
                value += weight[(static_cast<size_t>(channel) * in + k) * 9 + tap] *
                         pixel(frame, k, y + tap / 3 - 1, x + tap % 3 - 1);
        const size_t at = ((static_cast<size_t>(frame) * out_channels + channel) * call.height + y) * call.width + x;
        judge.expect(at, value + (call.residual == nullptr ? 0 : residual[at]));
    }
    return judge.passes(3e-5);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    generator.seed(std::strtoull(argv[2], nullptr, 10));
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
    int rounds = 0;
    for (; std::chrono::steady_clock::now() < end; ++rounds) {
        num_workers = pick(1, 3);
        if (!fuzz_linear() || !fuzz_winograd()) {
            std::printf("round %d is wrong\n", rounds);
            return 1;
        }
    }
    std::printf("%d rounds\n", rounds);
}
