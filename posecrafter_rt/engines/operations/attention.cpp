// Attention head by head; heads with many rows are divided into parts. Keys and values are packed. Then come rows of
// scores, as many at once as stay in a core's cache. Layer 4.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "attention_formats.h"

namespace posecrafter {

namespace {

constexpr int kFew = 12;               // the most keys that are not worth packing
constexpr int kScores = 1 << 16;       // scores computed at once, in floats
constexpr int kLeastRows = 4 * kRows;  // the fewest rows for which packing keys and values pays
constexpr float kHidden = -1e30f;      // a score that weighs nothing, unless all are hidden

// Returns where the channels of head `index`, counted over (batch, places, heads), begin in tokens that are `stride`
// floats apart. A batch has `count` rows.
size_t first_of(const Attention& call, size_t stride, int count, int index) {
    const int head = index % call.heads, at = index / call.heads, place = at % call.places, batch = at / call.places;
    const size_t token = static_cast<size_t>(batch) * count * call.places + place;
    return token * stride + static_cast<size_t>(head) * call.width;
}

Head head_of(const Tokens& tokens, const Attention& call, int count, int index) {
    const float* first = tokens.first + first_of(call, tokens.stride, count, index);
    return {{first, tokens.stride * call.places}, count, call.width};
}

// Where one head's rows of output go, at one place.
class Output {
public:
    Output(const Attention& call, int index) : width_(call.width) {
        const size_t channels = static_cast<size_t>(call.heads) * call.width;
        first_ = call.out + first_of(call, channels, call.queries, index), stride_ = channels * call.places;
    }

    // Writes a vector of channels from `channel` on, or as much of it as there is.
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

template <class Products>
class Job {
public:
    Job(const Attention& call, int threads)
        : call_(call),
          heads_(call.batch * call.places * call.heads),
          count_(round_up(call.keys, kPanel)),
          at_once_(std::min(count_, Products::kKeys)),
          stride_(at_once_ + kLanes),  // the extra lanes spread rows over the sets of a cache
          scale_(kLog2E / std::sqrt(static_cast<float>(call.width))) {
        const int even = threads / std::gcd(threads, heads_);  // as many tasks for each thread
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
        const int most_rows = std::max(1, kScores / at_once_ / Products::kBlock) * Products::kBlock;
        for (; row < last_row; row += most_rows) {
            const int count = std::min(most_rows, last_row - row);
            const Rows rows{query.rows.first + row * query.rows.stride, query.rows.stride};
            Means means(count, width);
            for (int key = 0; key < keys; key += at_once_)
                add(means, rows, std::min(at_once_, keys - key), packed_keys + Products::keys_at(key, width),
                    packed_values + Products::values_at(key));
            write(means, index, row);
        }
    }

    // The sums of some rows' weighted values so far, panel by panel. The largest weight of a row is 1.
    struct Means {
        Means(int rows, int width) : count(rows) {
            const size_t all = static_cast<size_t>(count) * round_up(width, kPanel);
            sums = thread_sums.take(all + static_cast<size_t>(count) * (kPanel + 3));
            added = sums + all, largest = added + static_cast<size_t>(count) * kPanel;
            weights = largest + count, factors = weights + count;
            std::fill_n(largest, count, -INFINITY);
            std::fill_n(weights, count, 0.0f);
        }

        // Rescales the earlier sums of a panel to the largest score, and adds the new ones.
        void join(float* panel) const {
            for (int r = 0; r < count; ++r)
                for (int at = r * kPanel; at < (r + 1) * kPanel; at += kLanes)
                    store(panel + at, load(panel + at) * factors[r] + load(added + at));
        }

        int count;
        float *sums, *added, *largest, *weights, *factors;  // added: new sums of one panel; factors: of earlier sums
    };

    void add(Means& means, Rows query, int keys, const float* packed_keys, const float* packed_values) const {
        const int count = means.count;
        const Sums scores{thread_scores.take(count * stride_), stride_};
        Products::score(query, count, keys, call_.width, packed_keys, scores);
        typename Products::Weights weights(count, stride_);
        const bool is_first = means.weights[0] == 0;
        for (int r = 0; r < count; ++r) {
            const float before = means.largest[r];
            const float sum = weights.weigh_row(scores.first + r * stride_, r, keys, round_up(keys, kPanel), scale_,
                                                means.largest[r]);
            means.factors[r] = is_first ? 0 : std::exp2((before - means.largest[r]) * scale_);
            means.weights[r] = means.weights[r] * means.factors[r] + sum;
        }
        for (int panel = 0; panel < ceil_div(call_.width, kPanel); ++panel) {
            const float* values = packed_values + panel * Products::panel_floats(call_.keys);
            float* sums = means.sums + static_cast<size_t>(panel) * count * kPanel;
            float* to = is_first ? sums : means.added;
            if (call_.width - panel * kPanel > kLanes)
                weights.template sum<2>(scores, count, keys, values, to);
            else
                weights.template sum<1>(scores, count, keys, values, to);
            if (!is_first) means.join(sums);
        }
    }

    void write(const Means& means, int index, int row) const {
        const Output out(call_, index);
        const float* sums = means.sums;
        for (int r = 0; r < means.count; ++r) means.factors[r] = 1 / means.weights[r];
        for (int panel = 0; panel < ceil_div(call_.width, kPanel); ++panel)
            for (int r = 0; r < means.count; ++r, sums += kPanel)
                for (int lane = 0; lane < kPanel; lane += kLanes)
                    out.write(row + r, panel * kPanel + lane, load(sums + lane) * means.factors[r]);
    }

    const Attention& call_;
    int heads_, parts_, count_, at_once_;
    size_t stride_;
    float scale_;
};

// Attention to few keys at many places, or with a mask: a few products of rows, whose cost is reading them.
class FewKeys {
public:
    explicit FewKeys(const Attention& call)
        : call_(call),
          count_(round_up(call.keys, kLanes)),
          whole_(call.width - call.width % kLanes),
          scale_(kLog2E / std::sqrt(static_cast<float>(call.width))) {}

    void run(const Parallel& parallel) const {
        parallel(call_.batch * call_.places, [&](int place) {
            for (int head = 0; head < call_.heads; ++head) run_head(place * call_.heads + head);
        });
    }

private:
    // Pointers to the rows of a head.
    using Starts = const float**;

    void run_head(int index) const {
        static thread_local std::vector<const float*> room;
        room.resize(2 * round_up(call_.keys, kFour) + call_.queries);
        Starts keys = room.data(), values = keys + round_up(call_.keys, kFour), queries = values + call_.keys;
        find(keys, call_.key, call_.own_key, thread_keys, index);
        find(values, call_.value, call_.own_value, thread_values, index);
        std::fill(keys + call_.keys, values, keys[0]);  // padding, whose scores are not used
        find(queries, head_of(call_.query, call_, call_.queries, index), thread_query);
        const Output out(call_, index);
        const int batch = index / call_.heads / call_.places;
        const char* mask = call_.mask == nullptr ? nullptr : call_.mask + static_cast<size_t>(batch) * call_.keys;
        float* scores = thread_scores.take(count_ + kFour);
        for (int row = 0; row < call_.queries; ++row) {
            score(queries[row], keys, scores);
            for (int key = 0; mask != nullptr && key < call_.keys; ++key)
                if (mask[key] == 0) scores[key] = kHidden;
            float largest = -INFINITY;
            const float inverse = 1 / weigh(scores, call_.keys, count_, scale_, largest);
            over_vectors([&](int channel, const auto& read) {
                Vector sum{};
                for (int key = 0; key < call_.keys; ++key) sum += scores[key] * read(values[key]);
                out.write(row, channel, sum * inverse);
            });
        }
    }

    // Finds the rows of a head; `own`, if given, has the last one.
    void find(Starts starts, const Tokens& tokens, const Tokens& own, Scratch& scratch, int index) const {
        const int owned = own.first == nullptr ? 0 : 1;
        find(starts, head_of(tokens, call_, call_.keys - owned, index), scratch);
        if (owned > 0) starts[call_.keys - 1] = head_of(own, call_, 1, index).rows.first;
    }

    // Copies rows that are read more than once, because all may begin in one set of a cache.
    void find(Starts starts, const Head& from, Scratch& scratch) const {
        const bool copies = call_.queries > 1;
        float* to = copies ? scratch.take(static_cast<size_t>(from.count) * from.width) : nullptr;
        for (int row = 0; row < from.count; ++row, to += copies ? from.width : 0) {
            starts[row] = from.rows.first + row * from.rows.stride;
            if (copies) starts[row] = std::copy_n(starts[row], from.width, to) - from.width;
        }
    }

    // Calls use(channel, read) for each vector of a row's channels; the last one may have fewer.
    template <class Use>
    PC_INLINE void over_vectors(const Use& use) const {
        for (int k = 0; k < whole_; k += kLanes) use(k, [k](const float* row) { return load(row + k); });
        if (whole_ < call_.width)
            use(whole_,
                [k = whole_, left = call_.width - whole_](const float* row) { return load_some(row + k, left); });
    }

    void score(const float* query, const float* const* keys, float* scores) const {
        for (int key = 0; key < call_.keys; key += kFour) {
            Vector sums[kFour] = {};
            over_vectors([&](int, const auto& read) {
                const Vector v = read(query);
#pragma GCC unroll 4
                for (int i = 0; i < kFour; ++i) sums[i] += v * read(keys[key + i]);
            });
            for (int i = 0; i < kFour; ++i) scores[key + i] = total(sums[i]);
        }
    }

    const Attention& call_;
    int count_, whole_;
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

#ifdef PC_HAS_TILES
void attention_pairs(const Attention& call, int threads, const Parallel& parallel) {
    const bool is_served = call.places == 1 && call.mask == nullptr && may_use_tiles();
    if (!is_served) return attention(call, threads, parallel);
    if (!is_empty(call)) Job<InPairs>(call, threads).run(parallel);
}
#endif

}  // namespace posecrafter
