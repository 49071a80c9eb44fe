// Attention of one head after the other, of large ones by parts of its rows: keys and values are packed, then follow as
// many rows of scores as stay in a core's cache. Layer 4.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "byte_format.h"
#include "memory.h"
#include "products.h"
#include "simd.h"
#include "words.h"

namespace posecrafter {

namespace {

constexpr int kFew = 12;               // keys that are not worth packing
constexpr int kScores = 1 << 16;       // that are computed at once, in floats
constexpr int kLeastRows = 4 * kRows;  // that are worth packing keys and values for
constexpr float kHidden = -1e30f;      // a score that weighs nothing, unless all are hidden

thread_local Scratch thread_query, thread_keys, thread_values, thread_scores, thread_sums, thread_words;

constexpr int round_up(int count, int to) { return ceil_div(count, to) * to; }

// One head's numbers at one place: rows of `width`.
struct Head {
    Rows rows;
    int count, width;
};

// Where that of an index begins, among `count` rows of tokens that are `stride` floats apart.
size_t first_of(const Attention& call, size_t stride, int count, int index) {
    const int head = index % call.heads, at = index / call.heads, place = at % call.places, batch = at / call.places;
    const size_t token = static_cast<size_t>(batch) * count * call.places + place;
    return token * stride + static_cast<size_t>(head) * call.width;
}

Head head_of(const Tokens& tokens, const Attention& call, int count, int index) {
    const float* first = tokens.first + first_of(call, tokens.stride, count, index);
    return {{first, tokens.stride * call.places}, count, call.width};
}

// Scores, (count), of which those beyond `keys` are to weigh nothing, to weights, the largest 1. Returns their sum.
template <class Store>
float weigh(float* scores, int keys, int count, float scale, const Store& store_weights) {
    std::fill(scores + keys, scores + count, -INFINITY);
    Vector high = load(scores), other = high, sum{};
    int at = 0;
    for (; at + 2 * kLanes <= count; at += 2 * kLanes) {
        high = larger(load(scores + at), high);
        other = larger(load(scores + at + kLanes), other);
    }
    if (at < count) high = larger(load(scores + at), high);
    const float largest = most(larger(high, other));
    for (int i = 0; i < count; i += kLanes) sum += store_weights(i, power_of_two((load(scores + i) - largest) * scale));
    return total(sum);
}

float weigh(float* scores, int keys, int count, float scale) {
    return weigh(scores, keys, count, scale, [=](int i, Vector weights) {
        store(scores + i, weights);
        return weights;
    });
}

// Where one head's rows of output go, at one place.
class Output {
public:
    Output(const Attention& call, int index) : width_(call.width) {
        const size_t channels = static_cast<size_t>(call.heads) * call.width;
        first_ = call.out + first_of(call, channels, call.queries, index), stride_ = channels * call.places;
    }

    // From `channel` on: a vector of it, or what there is of one.
    void write(int row, int channel, Vector v) const {
        float* to = first_ + row * stride_ + channel;
        const int left = width_ - channel;
        if (left >= kLanes)
            store(to, v);
        else if (left > 0)
            std::memcpy(to, &v, left * sizeof(float));
    }

private:
    float* first_;
    size_t stride_;
    int width_;
};

struct InFloats {
    static size_t panel_floats(int keys) { return static_cast<size_t>(keys) * kPanel; }
    static size_t key_floats(int keys, int width) { return static_cast<size_t>(round_up(keys, kPanel)) * width; }
    static size_t value_floats(int keys, int width) { return ceil_div(width, kPanel) * panel_floats(keys); }

    // (panels, width, kPanel)
    static void pack_keys(const Head& keys, float* packed) {
        for (int key = 0; key < round_up(keys.count, kPanel); key += kLanes) {
            float* to = packed + static_cast<size_t>(key / kPanel * kPanel) * keys.width + key % kPanel;
            const float* from = keys.rows.first + key * keys.rows.stride;
            const int there = std::min(std::max(keys.count - key, 0), kLanes);
            if (there == kLanes) {
                for (int k = 0; k < keys.width; k += kColumns) {
                    const int columns = std::min(kColumns, keys.width - k);
                    Vector v[kColumns];
                    read_columns(from + k, keys.rows.stride, columns, v);
                    for (int i = 0; i < columns; ++i) store(to + (k + i) * kPanel, v[i]);
                }
            } else {
                for (int k = 0; k < keys.width; ++k)
                    for (int lane = 0; lane < kLanes; ++lane)
                        to[k * kPanel + lane] = lane < there ? from[lane * keys.rows.stride + k] : 0;
            }
        }
    }

    // (panels, keys, kPanel)
    static void pack_values(const Head& values, float* packed) {
        for (int channel = 0; channel < values.width; channel += kPanel) {
            const int there = std::min(kPanel, values.width - channel);
            for (int key = 0; key < values.count; ++key, packed += kPanel) {
                std::copy_n(values.rows.first + key * values.rows.stride + channel, there, packed);
                std::fill(packed + there, packed + kPanel, 0.0f);
            }
        }
    }

    static void score(Rows query, int count, int keys, int width, const float* packed, Sums scores) {
        for (int key = 0; key < keys; key += kPanel) {
            const float* panel = packed + static_cast<size_t>(key) * width;
            multiply_rows(query, count, panel, width, scores.first + key, scores.stride);
        }
    }

    class Weights {
    public:
        Weights(int, size_t) {}

        float weigh_row(float* scores, int, int keys, int count, float scale) {
            return weigh(scores, keys, count, scale);
        }

        // kVectors: of the panel's, that there are channels for.
        template <int kVectors>
        void sum(Sums weights, int count, int keys, const float* panel, float* sums) const {
            multiply_deep_rows<kVectors>({weights.first, weights.stride}, count, panel, keys, sums, kPanel);
        }
    };
};

#ifdef PC_HAS_VNNI
struct InBytes {
    static constexpr size_t panel_floats(int keys) { return word_panel(ceil_div(keys, 2)); }

    static size_t key_floats(int keys, int width) { return ceil_div(keys, kPanel) * byte_panel(width); }
    static size_t value_floats(int keys, int width) { return ceil_div(width, kPanel) * panel_floats(keys); }

    // As `pack_bytes`, each key rounded to the 127th part of its largest number.
    static void pack_keys(const Head& keys, float* packed) {
        const int vectors = ceil_div(keys.width, kLanes);
        for (int key = 0; key < round_up(keys.count, kPanel); ++key) {
            float* scales = packed + key / kPanel * byte_panel(keys.width) + key % kPanel;
            auto* to = reinterpret_cast<int8_t*>(scales - key % kPanel + 2 * kPanel) + key % kPanel * kFour;
            const float* row = keys.rows.first + (key < keys.count ? key : 0) * keys.rows.stride;
            const Range range = key < keys.count ? range_of(row, keys.width) : Range{0, 0};
            const float largest = std::max(-range.low, range.high), inverse = largest > 0 ? 127 / largest : 0;
            auto* bytes = reinterpret_cast<int8_t*>(thread_query.take(vectors * kLanes));
            Integers sum{};
            for (int k = 0; k < keys.width; k += kLanes) {
                using Bytes = int8_t __attribute__((vector_size(kLanes)));
                const Integers whole = rounded(read(row, k, keys.width) * inverse);
                const Bytes narrow = __builtin_convertvector(whole, Bytes);
                std::memcpy(bytes + k, &narrow, sizeof narrow);
                sum += whole;
            }
            for (int k = 0; k < keys.width; k += kFour) std::memcpy(to + k * kPanel, bytes + k, kFour);
            for (int k = keys.width; k < byte_depth(keys.width); k += kFour) std::memset(to + k * kPanel, 0, kFour);
            scales[0] = (range.low == range.low ? largest : range.low) / 127;
            scales[kPanel] = total(__builtin_convertvector(sum, Vector)) * scales[0];
        }
    }

    // (panels, word_panel), each column rounded to the 511th part of its largest number.
    static void pack_values(const Head& values, float* packed) {
        for (int channel = 0; channel < values.width; channel += kPanel, packed += panel_floats(values.count))
            for (int half = 0; half < kPanel; half += kLanes) pack_columns(values, channel + half, packed, half);
    }

    static void pack_columns(const Head& values, int channel, float* panel, int half) {
        const auto row = [&](int key) { return values.rows.first + key * values.rows.stride; };
        Vector most{}, none{};
        for (int key = 0; key < values.count; ++key) {
            const Vector v = read(row(key), channel, values.width);
            most = larger(larger(v, -v), most);
            none += v * 0.0f;  // NaN where one is not finite: comparisons pass over it
        }
        const Vector inverse = most > Vector{} ? kMostValue / most : Vector{};
        store(panel + half, most * (1.0f / kMostValue) + none);
        auto* to = reinterpret_cast<int16_t*>(panel + kPanel) + half * 2;
        for (int key = 0; key < values.count; key += 2, to += 2 * kPanel) {
            Integers both = rounded(read(row(key), channel, values.width) * inverse) & 0xffff;
            if (key + 1 < values.count) both |= rounded(read(row(key + 1), channel, values.width) * inverse) << 16;
            std::memcpy(to, &both, sizeof both);
        }
    }

    static void score(Rows query, int count, int keys, int width, const float* packed, Sums scores) {
        const ByteRows rows = rows_to_bytes(query, count, width, thread_query.take(byte_rows_floats(count, width)));
        const Fetch none{scores.first, scores.first, 0, 0, 1, false};
        for (int key = 0; key < keys; key += kPanel, packed += byte_panel(width))
            Bytes::multiply(rows, 0, count, packed, {scores.first + key, scores.stride}, none);
    }

    class Weights {
    public:
        Weights(int count, size_t stride)
            : words_(reinterpret_cast<int16_t*>(thread_words.take(ceil_div(count, 2) * stride))), stride_(stride) {}

        float weigh_row(float* scores, int row, int keys, int count, float scale) {
            int16_t* to = words_ + row * stride_;
            return weigh(scores, keys, count, scale, [=](int i, Vector weights) {
                const Integers whole = rounded(weights * kMostWeight);
                store_words(to + i, whole);
                return __builtin_convertvector(whole, Vector) + weights * 0.0f;  // NaN of what is not a number
            });
        }

        template <int kVectors>
        void sum(Sums, int count, int keys, const float* panel, float* sums) const {
            multiply_word_rows<kVectors>({words_, stride_}, count, panel, ceil_div(keys, 2), sums);
        }

    private:
        int16_t* words_;
        size_t stride_;
    };
};
#endif

template <class Products>
class Job {
public:
    Job(const Attention& call, int threads)
        : call_(call),
          heads_(call.batch * call.places * call.heads),
          count_(round_up(call.keys, kPanel)),
          stride_(count_ + kLanes),  // else rows may all begin in one set of a cache
          scale_(kLog2E / std::sqrt(static_cast<float>(call.width))) {
        const int even = threads / std::gcd(threads, heads_);  // as many for each thread
        parts_ = std::max(1, std::min(even, call.queries / kLeastRows));
    }

    void run(const Parallel& parallel) const {
        parallel(heads_ * parts_, [&](int task) {
            const int index = task / parts_, part = task % parts_, rows = call_.queries;
            run_rows(index, static_cast<int>(int64_t{rows} * part / parts_),
                     static_cast<int>(int64_t{rows} * (part + 1) / parts_));
        });
    }

private:
    void run_rows(int index, int row, int last_row) const {
        const int keys = call_.keys, width = call_.width;
        float* packed_keys = thread_keys.take(Products::key_floats(keys, width));
        Products::pack_keys(head_of(call_.key, call_, keys, index), packed_keys);
        float* packed_values = thread_values.take(Products::value_floats(keys, width));
        Products::pack_values(head_of(call_.value, call_, keys, index), packed_values);
        const Head query = head_of(call_.query, call_, call_.queries, index);
        const int most_rows = std::max(kRows, kScores / count_ / kRows * kRows);
        for (; row < last_row; row += most_rows) {
            const int count = std::min(most_rows, last_row - row);
            const Sums scores{thread_scores.take(count * stride_), stride_};
            Products::score({query.rows.first + row * query.rows.stride, query.rows.stride}, count, keys, width,
                            packed_keys, scores);
            mean(index, row, count, packed_values, scores);
        }
    }

    void mean(int index, int row, int count, const float* packed_values, Sums scores) const {
        float* sums = thread_sums.take(static_cast<size_t>(count) * (kPanel + 1));
        float* inverses = sums + static_cast<size_t>(count) * kPanel;
        typename Products::Weights weights(count, stride_);
        for (int r = 0; r < count; ++r)
            inverses[r] = 1 / weights.weigh_row(scores.first + r * stride_, r, call_.keys, count_, scale_);
        const Output out(call_, index);
        for (int panel = 0; panel < ceil_div(call_.width, kPanel); ++panel) {
            const float* values = packed_values + panel * Products::panel_floats(call_.keys);
            if (call_.width - panel * kPanel > kLanes)
                weights.template sum<2>(scores, count, call_.keys, values, sums);
            else
                weights.template sum<1>(scores, count, call_.keys, values, sums);
            for (int r = 0; r < count; ++r)
                for (int lane = 0; lane < kPanel; lane += kLanes)
                    out.write(row + r, panel * kPanel + lane, load(sums + r * kPanel + lane) * inverses[r]);
        }
    }

    const Attention& call_;
    int heads_, parts_, count_;
    size_t stride_;
    float scale_;
};

// Few keys at many places: each head's tokens, which may all begin in one set of a cache, are copied, in whole vectors.
class FewKeys {
public:
    explicit FewKeys(const Attention& call)
        : call_(call),
          count_(round_up(call.keys, kLanes)),
          stride_(round_up(call.width, kLanes)),
          scale_(kLog2E / std::sqrt(static_cast<float>(call.width))) {}

    void run(const Parallel& parallel) const {
        parallel(call_.batch * call_.places, [&](int place) {
            for (int head = 0; head < call_.heads; ++head) run_head(place * call_.heads + head);
        });
    }

private:
    void run_head(int index) const {
        const float* keys =
            copy(head_of(call_.key, call_, call_.keys, index), round_up(call_.keys, kFour), thread_keys);
        const float* values = copy(head_of(call_.value, call_, call_.keys, index), call_.keys, thread_values);
        const Head query = head_of(call_.query, call_, call_.queries, index);
        const float* rows = copy(query, call_.queries, thread_query);
        const Output out(call_, index);
        const int batch = index / call_.heads / call_.places;
        const char* mask = call_.mask == nullptr ? nullptr : call_.mask + static_cast<size_t>(batch) * call_.keys;
        float* scores = thread_scores.take(count_ + kFour);
        for (int row = 0; row < call_.queries; ++row) {
            score(rows + row * stride_, keys, scores);
            for (int key = 0; mask != nullptr && key < call_.keys; ++key)
                if (mask[key] == 0) scores[key] = kHidden;
            const float inverse = 1 / weigh(scores, call_.keys, count_, scale_);
            for (size_t channel = 0; channel < stride_; channel += kLanes) {
                Vector sum{};
                for (int key = 0; key < call_.keys; ++key) sum += scores[key] * load(values + key * stride_ + channel);
                out.write(row, static_cast<int>(channel), sum * inverse);
            }
        }
    }

    const float* copy(const Head& from, int count, Scratch& scratch) const {
        float* copied = scratch.take(count * stride_);
        for (int row = 0; row < count; ++row) {
            const bool is_there = row < from.count;
            float* to = copied + row * stride_;
            if (is_there) std::copy_n(from.rows.first + row * from.rows.stride, from.width, to);
            std::fill(to + (is_there ? from.width : 0), to + stride_, 0.0f);
        }
        return copied;
    }

    void score(const float* query, const float* keys, float* scores) const {
        for (int key = 0; key < call_.keys; key += kFour) {
            Vector sums[kFour] = {};
            for (size_t k = 0; k < stride_; k += kLanes) {
                const Vector v = load(query + k);
#pragma GCC unroll 4
                for (int i = 0; i < kFour; ++i) sums[i] += v * load(keys + (key + i) * stride_ + k);
            }
            for (int i = 0; i < kFour; ++i) scores[key + i] = total(sums[i]);
        }
    }

    const Attention& call_;
    int count_;
    size_t stride_;
    float scale_;
};

bool is_empty(const Attention& call) { return call.batch <= 0 || call.queries <= 0 || call.places <= 0; }

bool has_few_keys(const Attention& call) { return call.mask != nullptr || (call.places > 1 && call.keys <= kFew); }

}  // namespace

void attention(const Attention& call, int threads, const Parallel& parallel) {
    if (is_empty(call)) return;
    if (has_few_keys(call))
        FewKeys(call).run(parallel);
    else
        Job<InFloats>(call, threads).run(parallel);
}

#ifdef PC_HAS_VNNI
void attention_bytes(const Attention& call, int threads, const Parallel& parallel) {
    if (call.places > 1 || call.mask != nullptr) return attention(call, threads, parallel);
    if (!is_empty(call)) Job<InBytes>(call, threads).run(parallel);
}
#endif

}  // namespace posecrafter
