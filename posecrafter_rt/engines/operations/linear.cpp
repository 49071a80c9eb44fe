// Linear maps over chunks of tokens that stay in a core's cache, one panel of weights after the other. Layer 4.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "byte_format.h"
#include "digit_format.h"
#include "memory.h"
#include "pictures.h"
#include "products.h"
#include "simd.h"
#include "word_format.h"

namespace posecrafter {

template <class Number>
void linear_pack(const float* weight, int in_channels, int out_channels, Number* packed, const Parallel& parallel) {
    const size_t depth = in_channels;
    parallel(out_channels / kPanel, [=](int panel) {
        Number* to = packed + panel * depth * kPanel;
        for (size_t k = 0; k < depth; ++k)
            for (int v = 0; v < kPanel; v += kLanes) {
                Vector numbers;
                for (int o = 0; o < kLanes; ++o) numbers[o] = weight[(size_t(panel) * kPanel + v + o) * depth + k];
                store(to + k * kPanel + v, numbers);
            }
    });
}

template void linear_pack(const float*, int, int, float*, const Parallel&);
template void linear_pack(const float*, int, int, Half*, const Parallel&);

namespace {

// LayerNorm of a token.
void normalise(const LayerNorm& norm, const float* from, int channels, float* to) {
    const int whole = channels - channels % kLanes;
    const auto sum = [=](const auto& of) {
        Vector sums{};
        for (int c = 0; c < whole; c += kLanes) sums += of(load(from + c));
        for (int c = whole; c < channels; ++c) sums[c - whole] += of(Vector{} + from[c])[0];
        return total(sums);
    };
    const float mean = sum([](Vector x) { return x; }) / static_cast<float>(channels);
    const float squares = sum([=](Vector x) { return (x - mean) * (x - mean); });
    const float scale = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(channels) + norm.eps));
    for (int c = 0; c < whole; c += kLanes)
        store(to + c, (load(from + c) - mean) * scale * load(norm.weight + c) + load(norm.bias + c));
    for (int c = whole; c < channels; ++c) to[c] = (from[c] - mean) * scale * norm.weight[c] + norm.bias[c];
}

constexpr int kChunkRows = 12 * 14, kLeastRows = 4 * kRows;
constexpr int kChunkFloats = 1 << 18;  // of a chunk's input, or between two layers; more if narrower
// With tiles, products are so fast that reading weights is the work, so a chunk fills a core's second-level cache.
constexpr int kTileChunkBytes = 1 << 20;
constexpr int kTileChunkRows = 2 * kChunkRows;  // rows whose sums are written at once
// Rows this long, or multiples of it, all begin in one set of the innermost cache. They are copied, like rows from
// planes or with a norm.
constexpr int kWayFloats = 1024;

thread_local Scratch thread_rows, thread_sums, thread_between, thread_numbers;

// Tokens of a chunk that lie in one frame.
struct Run {
    int frame, begin, count;
};

// Calls use(run, its first token within the chunk) for each run of the tokens from `first` on.
template <class Use>
void for_runs(int size, int64_t first, int count, const Use& use) {
    for (int done = 0; done < count;) {
        const int frame = static_cast<int>((first + done) / size), begin = static_cast<int>((first + done) % size);
        const Run run{frame, begin, std::min(count - done, size - begin)};
        use(run, done);
        done += run.count;
    }
}

// How products are computed: `prepare` converts rows of floats (in float32 it does nothing), `sum` computes a panel of
// sums.
template <class Number>
struct Products {
    using Own = Rows;
    static constexpr int kLighter = sizeof(float) / sizeof(Number);  // how many times as light as a float a weight is

    static bool is_tiled() { return false; }
    static Rows prepare(Rows rows, int, int) { return rows; }
    static Rows from(Rows rows, int row) { return {rows.first + row * rows.stride, rows.stride}; }

    static void sum(const Layer& layer, Rows rows, int count, int panel, float* sums, const Fetch&) {
        const auto packed = static_cast<const Number*>(layer.packed);
        const Number* weights = packed + static_cast<size_t>(panel) * layer.in_channels * kPanel;
        multiply_deep_rows(rows, count, weights, layer.in_channels, sums, kPanel);
    }
};

template <class Format>
struct ProductsIn {
    static constexpr int kLighter = Format::kLighter;

    struct Own {
        typename Format::Numbers rows;
        const PictureOf<Format>* windows;  // if given, they are the rows, from `first` on
        int64_t first;
    };

    static bool is_tiled() { return Format::is_tiled(); }
    static Own from(const Own& own, int row) {
        return {own.windows == nullptr ? own.rows.from(row) : own.rows, own.windows, own.first + row};
    }

    static Own prepare(Rows rows, int count, int depth) {
        return {Format::convert(rows, count, depth, thread_numbers.take(Format::floats(count, depth))), nullptr, 0};
    }

    static void sum(const Layer& layer, const Own& own, int count, int panel, float* sums, const Fetch& next) {
        if (own.windows != nullptr) return own.windows->sum(own.first, count, layer, panel, sums, next);
        const float* weights = static_cast<const float*>(layer.packed) + panel * Format::panel(layer.in_channels);
        Format::multiply(own.rows, count, weights, {sums, kPanel}, next);
    }
};

template <>
struct Products<Bytes> : ProductsIn<Bytes> {};

#ifdef PC_HAS_VNNI
template <>
struct Products<Words> : ProductsIn<Words> {};
#endif

#ifdef PC_HAS_TILES
template <>
struct Products<Digits> : ProductsIn<Digits> {};
#endif

template <class Format>
class Job {
    using In = Products<Format>;
    using Own = typename In::Own;
    static constexpr int kNarrower = std::is_same_v<Own, Rows> ? 1 : In::kLighter;  // factor by which rows are narrower

public:
    Job(const Linear& call, int threads)
        : call_(call),
          first_(call.layer),
          last_(has_next() ? call.next : call.layer),
          rows_(int64_t{call.frames} * call.size),
          panels_(last_.out_channels / kPanel),
          planes_(call.planes > 0 ? call.planes : last_.out_channels) {
        copies_ = call.from_planes || call.norm.weight != nullptr ||
                  (std::is_same_v<Own, Rows> && first_.in_channels % kWayFloats == 0);
        if (In::is_tiled()) {
            divide_for_tiles(threads);
            return;
        }
        const int widest = std::max(row_numbers(), has_next() ? last_.in_channels : 0);
        const int fitting = std::min(kChunkRows, std::max(kLeastRows, kChunkFloats * kNarrower / widest));
        row_parts_ = static_cast<int>((rows_ + fitting - 1) / fitting);
        // Divides the larger of the two, rows or weights. Rows that a thread has written are still in its cache.
        const bool is_many = call.windows == nullptr && rows_ >= last_.out_channels / In::kLighter;
        if (has_next() || row_parts_ >= threads || (is_many && rows_ >= int64_t{threads} * kRows))
            row_parts_ = ceil_div(row_parts_, threads) * threads;
        row_parts_ = static_cast<int>(std::min<int64_t>(row_parts_, rows_));
        panel_parts_ = std::min(panels_, ceil_div(threads, row_parts_));
        // If panels do not divide evenly between threads, the rows of each panel are divided.
        if (call.windows != nullptr && row_parts_ == 1 && panels_ % threads != 0)
            row_parts_ = threads, panel_parts_ = panels_;
        block_rows_ = static_cast<int>(rows_);
    }

    void run(const Parallel& parallel) const {
        parallel(row_parts_ * panel_parts_, [&](int task) {
            const int part = task % row_parts_, split = task / row_parts_;
            const int64_t first = whole(rows_ * part / row_parts_), last = whole(rows_ * (part + 1) / row_parts_);
            run_chunk(first, static_cast<int>(last - first), panels_ * split / panel_parts_,
                      panels_ * (split + 1) / panel_parts_);
        });
    }

private:
    // How many numbers are read for a row. Windows overlap, so a window needs only one pixel more.
    int row_numbers() const {
        return call_.windows == nullptr ? first_.in_channels : first_.in_channels / call_.windows->taps();
    }

    // Each thread reads all weights for its rows, or all rows for its weights. The latter if weights are more, as for a
    // small picture.
    void divide_for_tiles(int threads) {
        constexpr int kBytes = sizeof(float) / In::kLighter;  // per number
        int64_t row_bytes = int64_t{row_numbers()} * kBytes;
        if (has_next()) row_bytes += first_.out_channels * (sizeof(float) + kBytes);
        const int64_t weight_bytes = int64_t{first_.in_channels} * first_.out_channels * kBytes;
        const int64_t parts = (rows_ * row_bytes + kTileChunkBytes - 1) / kTileChunkBytes;
        const bool by_weights = parts == 1 && !has_next() && weight_bytes > rows_ * row_bytes;
        row_parts_ = by_weights ? 1 : static_cast<int>(std::min(rows_, (parts + threads - 1) / threads * threads));
        panel_parts_ = std::min(panels_, ceil_div(threads, row_parts_));
        block_rows_ = kTileChunkRows;
    }

    // Rounds down to whole rows of the picture, in which windows are computed.
    int64_t whole(int64_t row) const {
        return call_.windows == nullptr ? row : row / call_.windows->columns() * call_.windows->columns();
    }

    bool has_next() const { return call_.next.packed != nullptr; }
    bool ends_gated() const { return call_.is_gated && !has_next(); }

    void run_chunk(int64_t first, int count, int panel, int last_panel) const {
        Own rows = own_rows(first, count);
        float* sums = thread_sums.take(size_t{2} * kPanel * count);
        if (has_next()) rows = between(rows, count, sums);
        for (; panel < last_panel; ++panel)
            for (int begin = 0, end; begin < count; begin = end) {
                end = block_end(begin, count);
                run_block(In::from(rows, begin), first + begin, end - begin, panel, sums);
            }
    }

    // Returns where the block from `begin` on ends. Blocks are of nearly equal size.
    int block_end(int begin, int count) const {
        const int blocks = ceil_div(count - begin, block_rows_);
        const int64_t end = begin + (count - begin) / blocks;
        return blocks == 1 ? count : std::max(static_cast<int>(whole(end)), begin + least_block());
    }

    int least_block() const { return call_.windows == nullptr ? 1 : call_.windows->columns(); }

    void run_block(const Own& rows, int64_t first, int count, int panel, float* sums) const {
        if (ends_gated())
            gated(rows, count, panel, sums, sums, kPanel);
        else
            In::sum(last_, rows, count, panel, sums, written(first, panel));
        write(sums, first, count, panel);
    }

    Own own_rows(int64_t first, int count) const {
        if constexpr (!std::is_same_v<Own, Rows>)
            if (call_.windows != nullptr) return {{}, static_cast<const PictureOf<Format>*>(call_.windows), first};
        const size_t channels = first_.in_channels;
        const Rows rows = copies_ ? copy(first, count) : Rows{call_.input + first * channels, channels};
        return In::prepare(rows, count, first_.in_channels);
    }

    // Returns the first layer's output, which stays with the thread.
    Own between(Own rows, int count, float* sums) const {
        const size_t stride = first_.out_channels + kLanes;
        float* to = thread_between.take(stride * count);
        for (int panel = 0; panel * kPanel < first_.out_channels; ++panel)
            gated(rows, count, panel, sums, to + panel * kPanel, stride);
        return In::prepare({to, stride}, count, first_.out_channels);
    }

    Rows copy(int64_t first, int count) const {
        const size_t channels = first_.in_channels, stride = channels + kLanes;
        float* to = thread_rows.take(stride * count);
        if (call_.from_planes)
            for_runs(call_.size, first, count,
                     [&](Run run, int done) { copy_planes(run, to + done * stride, stride); });
        else
            for (int i = 0; i < count; ++i) copy_token(call_.input + (first + i) * channels, to + i * stride);
        return {to, stride};
    }

    void copy_token(const float* from, float* to) const {
        if (call_.norm.weight == nullptr)
            std::copy_n(from, first_.in_channels, to);
        else
            normalise(call_.norm, from, first_.in_channels, to);
    }

    void copy_planes(Run run, float* to, size_t stride) const {
        const size_t plane = call_.size;
        const bool scales = call_.scales.scale != nullptr;
        for (int channel = 0; channel < first_.in_channels; channel += kLanes) {
            const size_t at = size_t(run.frame) * first_.in_channels + channel;
            const float* from = call_.input + at * plane + run.begin;
            Vector scale{}, shift{};
            if (scales) scale = load(call_.scales.scale + at), shift = load(call_.scales.shift + at);
            for (int x = 0; x < run.count; x += kColumns) {
                const int columns = std::min(kColumns, run.count - x);
                Vector v[kColumns];
                read_columns(from + x, plane, columns, v);
                for (int i = 0; i < columns; ++i)
                    store(to + (x + i) * stride + channel, scales ? v[i] * scale + shift : v[i]);
            }
        }
    }

    // Computes a panel of the gated layer's output, with its biases. sums: room for two panels.
    void gated(const Own& rows, int count, int panel, float* sums, float* to, size_t stride) const {
        float* gates = sums + static_cast<size_t>(kPanel) * count;
        In::sum(first_, rows, count, panel, sums, Fetch::nothing(sums));
        In::sum(first_, rows, count, panel + first_.out_channels / kPanel, gates, Fetch::nothing(sums));
        const float *bias = first_.bias + panel * kPanel, *gate_bias = bias + first_.out_channels;
        for (int lane = 0; lane < kPanel; lane += kLanes) {
            const Vector of_value = load(bias + lane), of_gate = load(gate_bias + lane);
            for (int i = 0; i < count; ++i) {
                const Vector value = load(sums + i * kPanel + lane) + of_value;
                store(to + i * stride + lane, value * gelu(load(gates + i * kPanel + lane) + of_gate));
            }
        }
    }

    // Where a panel's output goes, for a chunk from `first` on; with planes of several frames, in the first frame only.
    Fetch written(int64_t first, int panel) const {
        const size_t channels = last_.out_channels, channel = size_t(panel) * kPanel, plane = call_.size;
        const size_t planes_at = (first / plane * planes_ + channel) * plane + first % plane;
        const float* residual = call_.residual;
        if (call_.to_planes && planes_ < kPanel) return Fetch::nothing(call_.out + planes_at);
        if (call_.to_planes)
            return {call_.out + planes_at,
                    (residual == nullptr ? call_.out : residual) + planes_at,
                    plane,
                    1,
                    kPanel,
                    false};
        const Place to = tokens(panel);
        const float* out = to.first + first * to.stride;
        return {out, residual == nullptr ? out : residual + first * channels + channel, to.stride, to.stride, 16, true};
    }

    // Where the first token's output of a panel goes, and the distance from one token to the next.
    struct Place {
        float* first;
        size_t stride;
    };

    Place tokens(int panel) const {
        int channel = panel * kPanel;
        for (const Part& part : call_.parts) {
            if (channel < part.channels) return {part.out + channel, static_cast<size_t>(part.channels)};
            channel -= part.channels;
        }
        return {call_.out + channel, static_cast<size_t>(last_.out_channels)};
    }

    void write(const float* sums, int64_t first, int count, int panel) const {
        const Place to = tokens(panel);
        for (int lane = 0; lane < kPanel; lane += kLanes) {
            const int channel = panel * kPanel + lane;
            const Vector bias = ends_gated() ? Vector{} : load(last_.bias + channel);
            if (call_.to_planes)
                for_runs(call_.size, first, count,
                         [&](Run run, int done) { write_planes(sums + done * kPanel + lane, run, channel, bias); });
            else
                write_tokens(sums + lane, first, count, {to.first + lane, to.stride}, channel, bias);
        }
    }

    void write_tokens(const float* sums, int64_t first, int count, Place to, int channel, Vector bias) const {
        for (int i = 0; i < count; ++i) {
            const Vector v = load(sums + i * kPanel) + bias;
            const size_t at = (first + i) * last_.out_channels + channel;
            store(to.first + (first + i) * to.stride, call_.residual == nullptr ? v : v + load(call_.residual + at));
        }
    }

    void write_planes(const float* sums, Run run, int channel, Vector bias) const {
        const size_t plane = call_.size, at = (size_t(run.frame) * planes_ + channel) * plane + run.begin;
        const float* residual = call_.residual == nullptr ? nullptr : call_.residual + at;
        for (int x = 0; x < run.count; x += kColumns)
            write_columns_of(planes_ - channel, sums + x * kPanel, kPanel, bias, std::min(kColumns, run.count - x),
                             residual == nullptr ? nullptr : residual + x, call_.out + at + x, plane);
    }

    const Linear& call_;
    const Layer &first_, &last_;
    int64_t rows_;
    int panels_, planes_, row_parts_, panel_parts_, block_rows_;  // block: rows whose sums are written at once
    bool copies_;
};

}  // namespace

template <class Format>
void linear(const Linear& call, int threads, const Parallel& parallel) {
    if (call.frames > 0 && call.size > 0) Job<Format>(call, threads).run(parallel);
}

template void linear<float>(const Linear&, int, const Parallel&);
template void linear<Half>(const Linear&, int, const Parallel&);
#ifdef PC_HAS_VNNI
template void linear<Bytes>(const Linear&, int, const Parallel&);
template void linear<Words>(const Linear&, int, const Parallel&);
#endif
#ifdef PC_HAS_TILES
template void linear<Digits>(const Linear&, int, const Parallel&);
#endif

}  // namespace posecrafter
