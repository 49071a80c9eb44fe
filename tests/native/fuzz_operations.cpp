// Fuzzes the operations of engines/operations/ under ASan and UBSan, against sums in double: odd sizes, more threads
// asked for than tasks, tasks in any order, threads that go from one call to the next; with weights in 16 bits, and in
// 16 or eight bits where it is compiled for these. Usage: fuzz_operations SECONDS SEED. Buffers are exact heap blocks,
// so that a stray access is caught, and outputs begin as NaN.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "attention.h"
#include "bytes.h"
#include "convolution.h"
#include "fuzz.h"
#include "linear.h"
#include "pictures.h"
#include "products.h"
#include "winograd.h"
#include "word_format.h"

using namespace fuzz;
using namespace posecrafter;

namespace {

// What weights are, of eight bits also what they multiply; and how much that may differ from sums in double, of the
// largest.
enum class Kind { floats, halves, bytes, digits, words };
constexpr double kInBytes = 0.1, kInHalves = 0.005, kInDigits = 0.002, kInWords = 0.003, kInPairs = 1e-4;

constexpr double kEps = 1e-5;  // of norms

double tolerance_of(Kind kind) {
    const double tolerances[] = {1e-5, kInHalves, kInBytes, kInDigits, kInWords};
    return tolerances[static_cast<int>(kind)];
}

// One layer's weights and what they give, in double.
struct Drawn {
    int in, rows;
    std::vector<float> weight = draw(static_cast<size_t>(rows) * in), bias = draw(rows);
    Packed packed;

    Drawn(int in_channels, int out_rows, Kind kind) : in(in_channels), rows(out_rows), packed(block(num_floats(kind))) {
        pack(kind);
    }

    void pack(Kind kind) {
#ifdef PC_HAS_TILES
        if (kind == Kind::digits) return pack_digits(weight.data(), in, 1, rows, packed.get(), parallel);
#endif
#ifdef PC_HAS_VNNI
        if (kind == Kind::words) return pack_words(weight.data(), in, 1, rows, packed.get(), parallel);
#endif
        if (kind == Kind::bytes)
            pack_bytes(weight.data(), in, 1, rows, packed.get(), parallel);
        else if (kind == Kind::halves)
            linear_pack(weight.data(), in, rows, reinterpret_cast<Half*>(packed.get()), parallel);
        else
            linear_pack(weight.data(), in, rows, packed.get(), parallel);
    }

    size_t num_floats(Kind kind) const {
#ifdef PC_HAS_TILES
        if (kind == Kind::digits) return rows / kPanel * digit_panel(in);
#endif
#ifdef PC_HAS_VNNI
        if (kind == Kind::words) return rows / kPanel * word_panel(in);
#endif
        if (kind == Kind::bytes) return rows / kPanel * byte_panel(in);
        return kind == Kind::halves ? weight.size() / 2 : weight.size();
    }

    template <class Input>
    double at(int row, const Input& input) const {
        double sum = bias[row];
        for (int k = 0; k < in; ++k) sum += double{weight[static_cast<size_t>(row) * in + k]} * input(k);
        return sum;
    }
};

double gelu_of(double x) { return x * 0.5 * std::erfc(-x / std::sqrt(2.0)); }

void run_linear(const Linear& call, int threads, Kind kind) {
#ifdef PC_HAS_TILES
    if (kind == Kind::digits) return linear<Digits>(call, threads, parallel);
#endif
#ifdef PC_HAS_VNNI
    if (kind == Kind::bytes) return linear<Bytes>(call, threads, parallel);
    if (kind == Kind::words) return linear<Words>(call, threads, parallel);
#endif
    (kind == Kind::halves ? linear<Half> : linear<float>)(call, threads, parallel);
}

// LayerNorm of a token, in double.
std::vector<double> normed(const float* x, const std::vector<float>& weight, const std::vector<float>& bias) {
    const size_t count = weight.size();
    const double mean = std::accumulate(x, x + count, 0.0) / count;
    double squares = 0;
    for (size_t i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
    std::vector<double> values(count);
    for (size_t i = 0; i < count; ++i)
        values[i] = (x[i] - mean) / std::sqrt(squares / count + kEps) * weight[i] + bias[i];
    return values;
}

// Outputs of some channels each, exact blocks as all others.
struct Parts {
    std::vector<std::vector<float>> out;

    std::vector<Part> draw_parts(size_t tokens, int channels) {
        std::vector<Part> parts;
        for (int width; channels > 0; channels -= width) {
            width = kPanel * pick(1, channels / kPanel);
            out.emplace_back(tokens * width, NAN);
            parts.push_back({out.back().data(), width});
        }
        return parts;
    }

    std::vector<float> joined(size_t tokens) const {
        std::vector<float> all;
        for (size_t token = 0; token < tokens; ++token)
            for (const auto& part : out) {
                const size_t width = part.size() / tokens;
                all.insert(all.end(), part.begin() + token * width, part.begin() + (token + 1) * width);
            }
        return all;
    }
};

bool fuzz_linear(Kind kind) {
    Linear call{};
    call.frames = pick(1, 6), call.size = pick(0, 3) != 0 ? pick(1, 60) : pick(1, 500);
    call.from_planes = flip(), call.to_planes = flip(), call.is_gated = flip();
    const bool has_next = call.is_gated && flip();
    const int plain = pick(0, 5) != 0 ? pick(1, 100) : (flip() ? 1024 : pick(500, 1100));
    const int fitting = kind == Kind::bytes ? ceil_div(plain, kFour) * kFour : plain;
    const int in = call.from_planes ? kLanes * pick(1, pick(0, 4) != 0 ? 6 : 70) : fitting;
    const int middle = kPanel * pick(1, has_next && pick(0, 2) == 0 ? 40 : 5);
    const int out_channels = has_next ? kPanel * pick(1, 4) : middle;
    const Drawn first(in, middle * (call.is_gated ? 2 : 1), kind), next(middle, out_channels, kind);
    const size_t tokens = static_cast<size_t>(call.frames) * call.size;
    const std::vector<float> input = draw(tokens * in), residual = draw(tokens * out_channels);
    std::vector<float> out(tokens * out_channels, NAN);
    call.input = input.data(), call.out = out.data(), call.residual = flip() ? residual.data() : nullptr;
    call.layer = {first.packed.get(), first.bias.data(), in, middle};
    if (has_next) call.next = {next.packed.get(), next.bias.data(), middle, out_channels};
    const std::vector<float> weight = draw(in), bias = draw(in);
    const std::vector<float> scale = draw(size_t(call.frames) * in), shift = draw(size_t(call.frames) * in);
    const bool is_normed = flip();
    if (is_normed && call.from_planes)
        call.scales = {scale.data(), shift.data()};
    else if (is_normed)
        call.norm = {weight.data(), bias.data(), kEps};
    Parts parts;
    if (!call.to_planes && call.residual == nullptr && flip()) {
        call.parts = parts.draw_parts(tokens, out_channels);
        call.out = nullptr;
    }
    run_linear(call, pick(1, flip() ? 4 : 40), kind);

    if (call.out == nullptr) out = parts.joined(tokens);
    Judge judge(out);
    const auto index = [&](bool is_planes, int frame, int token, int channel, int channels) {
        const size_t before = static_cast<size_t>(frame);
        return is_planes ? (before * channels + channel) * call.size + token
                         : (before * call.size + token) * channels + channel;
    };
    for (int trial = 0; trial < (has_next ? 12 : 60); ++trial) {
        const int frame = trial == 0 ? call.frames - 1 : pick(0, call.frames - 1);
        const int token = trial == 0 ? call.size - 1 : pick(0, call.size - 1), channel = pick(0, out_channels - 1);
        std::vector<double> values(in);
        for (int k = 0; k < in; ++k) values[k] = input[index(call.from_planes, frame, token, k, in)];
        if (is_normed && call.from_planes)
            for (int k = 0; k < in; ++k) values[k] = values[k] * scale[frame * in + k] + shift[frame * in + k];
        else if (is_normed)
            values = normed(input.data() + index(false, frame, token, 0, in), weight, bias);
        const auto given = [&](int k) { return values[k]; };
        const auto layer = [&](int row) {
            return call.is_gated ? first.at(row, given) * gelu_of(first.at(row + middle, given)) : first.at(row, given);
        };
        const size_t at = index(call.to_planes, frame, token, channel, out_channels);
        judge.expect(
            at, (has_next ? next.at(channel, layer) : layer(channel)) + (call.residual == nullptr ? 0 : residual[at]));
    }
    return judge.passes(tolerance_of(kind));
}

// Pictures with each pixel repeated `times` in either direction, zeros around them, in double.
struct Pictures {
    int frames, channels, height, width, times;
    std::vector<float> input = draw(static_cast<size_t>(frames) * channels * height * width);
    std::vector<double> scale, shift;  // of each channel of each frame: it is SiLU(input · scale + shift); or none

    void norm(const std::vector<float>& weight, const std::vector<float>& bias, int groups, double eps) {
        const int group_width = channels / groups;
        const size_t count = static_cast<size_t>(group_width) * height * width;
        for (int group = 0; group < frames * groups; ++group) {
            const float* x = input.data() + group * count;
            const double mean = std::accumulate(x, x + count, 0.0) / count;
            double squares = 0;
            for (size_t i = 0; i < count; ++i) squares += (x[i] - mean) * (x[i] - mean);
            for (int c = group % groups * group_width; c < (group % groups + 1) * group_width; ++c) {
                scale.push_back(weight[c] / std::sqrt(squares / count + eps));
                shift.push_back(bias[c] - mean * scale.back());
            }
        }
    }

    double at(int frame, int k, int y, int x) const {
        if (k >= channels || y < 0 || x < 0 || y >= times * height || x >= times * width) return 0;
        const size_t plane = static_cast<size_t>(frame) * channels + k;
        const double value = input[(plane * height + y / times) * width + x / times];
        if (scale.empty()) return value;
        const double normed = value * scale[plane] + shift[plane];
        return normed / (1 + std::exp(-normed));
    }
};

// A 3×3 convolution's weights (rows, in, 3, 3), or those (in, rows, 4, 4) of a transposed one, which doubles pictures.
struct Kernel {
    int in, rows;
    bool is_transposed = false;
    std::vector<float> weight = draw(static_cast<size_t>(rows) * in * (is_transposed ? 16 : 9)), bias = draw(rows);

    // Of the window whose first pixel is at (top, left), in double.
    double at(int row, const Pictures& pictures, int frame, int top, int left) const {
        double sum = bias[row];
        for (int k = 0; k < in; ++k)
            for (int tap = 0; tap < 9; ++tap)
                sum += weight[(static_cast<size_t>(row) * in + k) * 9 + tap] *
                       pictures.at(frame, k, top + tap / 3, left + tap % 3);
        return sum;
    }

    // Of a transposed one at (y, x) of the doubled picture: input pixel i meets outputs 2i - 1 to 2i + 2.
    double doubled_at(int row, const Pictures& pictures, int frame, int y, int x) const {
        double sum = bias[row];
        for (int k = 0; k < in; ++k)
            for (int tap = 0; tap < 16; ++tap) {
                const int above = y + 1 - tap / 4, before = x + 1 - tap % 4;
                if (above % 2 == 0 && before % 2 == 0)
                    sum += weight[(static_cast<size_t>(k) * rows + row) * 16 + tap] *
                           pictures.at(frame, k, above / 2, before / 2);
            }
        return sum;
    }
};

// Whether out (frames, planes, height, width) is the convolution of pictures, of the first rows of a kernel, plus a
// residual where there is one.
bool is_convolution(const std::vector<float>& out, int planes, const float* residual, const Kernel& kernel,
                    const Pictures& pictures, int stride, double tolerance) {
    const int times = kernel.is_transposed ? 2 : pictures.times;
    const int height = ceil_div(times * pictures.height, stride), width = ceil_div(times * pictures.width, stride);
    Judge judge(out);
    for (int trial = 0; trial < 150; ++trial) {
        const int frame = pick(0, pictures.frames - 1), channel = pick(0, planes - 1);
        const int y = pick(0, height - 1), x = pick(0, width - 1);
        const size_t at = ((static_cast<size_t>(frame) * planes + channel) * height + y) * width + x;
        const double value = kernel.is_transposed ? kernel.doubled_at(channel, pictures, frame, y, x)
                                                  : kernel.at(channel, pictures, frame, y * stride - 1, x * stride - 1);
        judge.expect(at, value + (residual == nullptr ? 0 : residual[at]));
    }
    return judge.passes(tolerance);
}

// All of some channels, or the first ones, without a part of the last panel.
int first_of(int channels) { return flip() ? channels : channels - pick(0, kPanel - 1); }

bool fuzz_winograd() {
    Convolution call{};
    call.times = pick(1, 2), call.tile = flip() ? 2 : 4, call.frames = pick(1, 4);
    call.in_halves = call.tile == 2 && flip();
    const int height = pick(1, pick(0, 3) != 0 ? 12 : 60), width = pick(1, pick(0, 3) != 0 ? 20 : 90);
    call.height = call.times * height, call.width = call.times * width;
    const bool is_few = pick(0, 3) == 0;
    call.in_channels = kLanes * (is_few ? 1 : pick(1, 3)), call.out_channels = kPanel * pick(1, 2);
    call.in_planes = is_few ? pick(1, kLanes) : call.in_channels, call.out_planes = first_of(call.out_channels);
    const int in = call.in_channels, out_channels = call.out_channels;
    Pictures pictures{call.frames, call.in_planes, height, width, call.times};
    const Kernel kernel{in, out_channels};
    const size_t planes = static_cast<size_t>(call.frames) * in;
    const size_t count = static_cast<size_t>(call.frames) * call.out_planes * call.height * call.width;
    const std::vector<float> scale = draw(planes), shift = draw(planes), residual = draw(count);
    std::vector<float> out(count, NAN);
    const size_t numbers = static_cast<size_t>(winograd_products(call.tile)) * in * out_channels;
    const Packed packed = block(call.in_halves ? numbers / 2 : numbers);
    if (call.in_halves)
        winograd_pack(kernel.weight.data(), in, out_channels, call.tile, reinterpret_cast<Half*>(packed.get()),
                      parallel);
    else
        winograd_pack(kernel.weight.data(), in, out_channels, call.tile, packed.get(), parallel);
    call.input = pictures.input.data(), call.packed = packed.get();
    call.bias = kernel.bias.data(), call.out = out.data();
    if (!is_few && flip()) {
        call.scale = scale.data(), call.shift = shift.data();
        pictures.scale.assign(scale.begin(), scale.end()), pictures.shift.assign(shift.begin(), shift.end());
    }
    if (flip()) call.residual = residual.data();
    winograd_convolve(call, pick(1, flip() ? 4 : 40), parallel);
    return is_convolution(out, call.out_planes, call.residual, kernel, pictures, 1, call.in_halves ? kInHalves : 3e-5);
}

// A row's scores, and its weights, in double.
std::vector<double> weights_of(std::vector<double> scores) {
    const double most = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (double& score : scores) sum += score = std::exp(score - most);
    for (double& score : scores) score /= sum;
    return scores;
}

// Each of some stretches of equal lengths without its last numbers, and those.
void split(const std::vector<float>& all, int stretches, size_t last, std::vector<float>& others,
           std::vector<float>& lasts) {
    const size_t length = all.size() / stretches;
    for (int i = 0; i < stretches; ++i) {
        const auto end = all.begin() + (i + 1) * length;
        others.insert(others.end(), all.begin() + i * length, end - last);
        lasts.insert(lasts.end(), end - last, end);
    }
    others.shrink_to_fit(), lasts.shrink_to_fit();
}

bool fuzz_attention(void (*attend)(const Attention&, int, const Parallel&), double tolerance) {
    Attention call{};
    const bool in_bytes = tolerance == kInBytes;
    call.batch = pick(1, 3), call.heads = pick(1, 4), call.width = in_bytes ? kFour * pick(1, 24) : pick(1, 90);
    call.places = flip() ? 1 : pick(1, 20), call.queries = pick(1, pick(0, 3) != 0 ? 40 : 400);
    call.keys = pick(1, pick(0, 3) != 0 ? 40 : 1100);
    const size_t channels = static_cast<size_t>(call.heads) * call.width;
    const size_t tokens[] = {static_cast<size_t>(call.batch) * call.queries * call.places,
                             static_cast<size_t>(call.batch) * call.keys * call.places};
    std::vector<float> drawn[3], out(tokens[0] * channels, NAN);
    Tokens* given[] = {&call.query, &call.key, &call.value};
    for (int i = 0; i < 3; ++i) {  // the last of some channels, so that an end is an end
        const size_t wider = flip() ? pick(1, 20) : 0;
        drawn[i] = draw(tokens[i != 0] * (channels + wider));
        *given[i] = {drawn[i].data() + wider, channels + wider};
    }
    std::vector<char> mask(static_cast<size_t>(call.batch) * call.keys);
    for (char& there : mask) there = flip();
    for (int b = 0; b < call.batch; ++b) mask[static_cast<size_t>(b) * call.keys + pick(0, call.keys - 1)] = 1;
    call.mask = !in_bytes && call.keys < 60 && flip() ? mask.data() : nullptr, call.out = out.data();
    const Attention whole = call;
    std::vector<float> others[2], own[2];  // the last keys and values apart
    if (call.mask != nullptr && call.keys > 1 && flip())
        for (int i = 0; i < 2; ++i) {
            Tokens *before = given[i + 1], *last = i == 0 ? &call.own_key : &call.own_value;
            split(drawn[i + 1], call.batch, call.places * before->stride, others[i], own[i]);
            *last = {own[i].data() + before->stride - channels, before->stride};
            before->first = others[i].data() + before->stride - channels;
        }
    attend(call, pick(1, flip() ? 4 : 40), parallel);

    Judge judge(out);
    for (int trial = 0; trial < 40; ++trial) {
        const int batch = pick(0, call.batch - 1), place = pick(0, call.places - 1), head = pick(0, call.heads - 1);
        const int row = trial == 0 ? call.queries - 1 : pick(0, call.queries - 1), channel = pick(0, call.width - 1);
        const auto token = [&](int count, int index) {
            return (static_cast<size_t>(batch) * count + index) * call.places + place;
        };
        const auto number = [&](const Tokens& from, int count, int index, int k) {
            return double{from.first[token(count, index) * from.stride + static_cast<size_t>(head) * call.width + k]};
        };
        std::vector<double> scores(call.keys);
        for (int key = 0; key < call.keys; ++key) {
            for (int k = 0; k < call.width; ++k)
                scores[key] += number(whole.query, call.queries, row, k) * number(whole.key, call.keys, key, k);
            scores[key] /= std::sqrt(call.width);
            if (call.mask != nullptr && mask[static_cast<size_t>(batch) * call.keys + key] == 0) scores[key] = -1e30;
        }
        const std::vector<double> weights = weights_of(scores);
        double mean = 0;
        for (int key = 0; key < call.keys; ++key) mean += weights[key] * number(whole.value, call.keys, key, channel);
        judge.expect(token(call.queries, row) * channels + static_cast<size_t>(head) * call.width + channel, mean);
    }
    return judge.passes(tolerance);
}

template <class Format>
bool fuzz_convolution(double tolerance) {
    const int times = pick(1, 2), stride = times == 2 ? 1 : pick(1, 2), groups = flip() ? kLanes >> pick(0, 3) : 0;
    const int side = pick(0, 3) != 0 ? 10 : 40;
    const int in = kLanes * pick(1, 3), out_channels = kPanel * pick(1, 2), planes = first_of(out_channels);
    Pictures pictures{pick(1, 9), in, pick(1, side), pick(1, side), 1};
    const Kernel kernel{in, out_channels, times == 2};
    const Window window{stride, times, ceil_div(times * pictures.height, stride),
                        ceil_div(times * pictures.width, stride)};
    const size_t count = static_cast<size_t>(pictures.frames) * planes * window.out_height * window.out_width;
    const std::vector<float> weight = draw(in), bias = draw(in), residual = draw(count);
    std::vector<float> out(count, NAN);
    const Packed packed = block(packed_windows<Format>(times, in, out_channels));
    pack_windows<Format>(kernel.weight.data(), in, out_channels, times, packed.get(), parallel);
    WindowConvolution call{};
    call.picture.input = pictures.input.data(), call.picture.frames = pictures.frames, call.picture.channels = in;
    call.picture.height = pictures.height, call.picture.width = pictures.width;
    call.picture.groups = groups, call.picture.eps = kEps;
    if (flip()) {
        call.picture.weight = weight.data(), call.picture.bias = bias.data();
        if (groups > 0) pictures.norm(weight, bias, groups, kEps);
        for (int plane = 0; groups == 0 && plane < pictures.frames * in; ++plane)
            pictures.scale.push_back(weight[plane % in]), pictures.shift.push_back(bias[plane % in]);
    }
    call.window = window, call.packed = packed.get(), call.bias = kernel.bias.data(), call.out = out.data();
    call.residual = flip() ? residual.data() : nullptr;
    call.out_channels = out_channels, call.planes = planes;
    convolve_windows<Format>(call, pick(1, flip() ? 4 : 40), parallel);
    return is_convolution(out, planes, call.residual, kernel, pictures, stride, tolerance);
}

bool fuzz_fewer_bits() {
#ifdef PC_HAS_TILES
    if (may_use_tiles() && !(fuzz_linear(Kind::digits) && fuzz_convolution<Digits>(kInDigits))) return false;
    if (!fuzz_attention(attention_pairs, kInPairs)) return false;
#endif
#ifdef PC_HAS_VNNI
    if (!fuzz_linear(Kind::words) || !fuzz_convolution<Words>(kInWords)) return false;
    return fuzz_linear(Kind::bytes) && fuzz_convolution<Bytes>(kInBytes) && fuzz_attention(attention_bytes, kInBytes);
#else
    return true;
#endif
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    generator.seed(std::strtoull(argv[2], nullptr, 10));
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
    int rounds = 0;
    for (; std::chrono::steady_clock::now() < end; ++rounds) {
        num_workers = pick(1, 3);
        if (!fuzz_linear(Kind::floats) || !fuzz_linear(Kind::halves) || !fuzz_winograd() ||
            !fuzz_attention(attention, 1e-5) || !fuzz_fewer_bits()) {
            std::printf("round %d is wrong\n", rounds);
            return 1;
        }
    }
    std::printf("%d rounds\n", rounds);
}
