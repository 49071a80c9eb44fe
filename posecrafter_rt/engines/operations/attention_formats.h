// How attention computes products: in floats, in bytes and words, or in pairs of 16-bit floats. Each format packs the
// keys and values of one head, and computes the scores, weights and means of some of its rows. Layer 4.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "byte_format.h"
#include "means.h"
#include "memory.h"
#include "pairs.h"
#include "products.h"
#include "simd.h"
#include "words.h"

namespace posecrafter {

inline thread_local Scratch thread_query, thread_keys, thread_values, thread_scores, thread_sums, thread_words;

constexpr int round_up(int count, int to) { return ceil_div(count, to) * to; }

// One head's numbers at one place: `count` rows of `width` numbers.
struct Head {
    Rows rows;
    int count, width;
};

// Turns scores (count) into weights, of which 1 belongs to the largest score so far. Scores from `keys` on weigh
// nothing. Updates `largest` and returns the sum of the weights.
template <class Store>
float weigh(float* scores, int keys, int count, float scale, float& largest, const Store& store_weights) {
    std::fill(scores + keys, scores + count, -INFINITY);
    Vector high = load(scores), other = high, sum{};
    int at = 0;
    for (; at + 2 * kLanes <= count; at += 2 * kLanes) {
        high = larger(load(scores + at), high);
        other = larger(load(scores + at + kLanes), other);
    }
    if (at < count) high = larger(load(scores + at), high);
    largest = std::max(most(larger(high, other)), largest);
    for (int i = 0; i < count; i += kLanes) sum += store_weights(i, power_of_two((load(scores + i) - largest) * scale));
    return total(sum);
}

inline float weigh(float* scores, int keys, int count, float scale, float& largest) {
    return weigh(scores, keys, count, scale, largest, [=](int i, Vector weights) {
        store(scores + i, weights);
        return weights;
    });
}

constexpr int kAnyKeys = INT_MAX / 2;

struct InFloats {
    static constexpr int kBlock = kRows;    // rows that are best computed at once
    static constexpr int kKeys = kAnyKeys;  // keys that are weighed at once
    static size_t keys_at(int key, int width) { return static_cast<size_t>(key) * width; }  // the offset in packed keys
    static size_t values_at(int key) { return static_cast<size_t>(key) * kPanel; }

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

        float weigh_row(float* scores, int, int keys, int count, float scale, float& largest) {
            return weigh(scores, keys, count, scale, largest);
        }

        // kVectors: how many of the panel's vectors have channels.
        template <int kVectors>
        void sum(Sums weights, int count, int keys, const float* panel, float* sums) const {
            multiply_deep_rows<kVectors>({weights.first, weights.stride}, count, panel, keys, sums, kPanel);
        }
    };
};

#ifdef PC_HAS_VNNI
struct InBytes {
    static constexpr int kBlock = kRows, kKeys = kAnyKeys;
    static size_t keys_at(int key, int width) { return key / kPanel * byte_panel(width); }
    static size_t values_at(int key) { return static_cast<size_t>(key) / 2 * kPanel; }

    static constexpr size_t panel_floats(int keys) { return value_panel(ceil_div(keys, 2)); }

    static size_t key_floats(int keys, int width) { return ceil_div(keys, kPanel) * byte_panel(width); }
    static size_t value_floats(int keys, int width) { return ceil_div(width, kPanel) * panel_floats(keys); }

    // Packed like `pack_bytes`; each key is rounded to 1/127 of its largest magnitude.
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

    // (panels, value_panel), each column rounded to 1/511 of its largest magnitude.
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
            none += v * 0.0f;  // NaN if one is not finite, which comparisons miss
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
        for (int key = 0; key < keys; key += kPanel, packed += byte_panel(width))
            Bytes::multiply(rows, count, packed, {scores.first + key, scores.stride}, Fetch::nothing(packed));
    }

    class Weights {
    public:
        Weights(int count, size_t stride)
            : words_(reinterpret_cast<int16_t*>(thread_words.take(ceil_div(count, 2) * stride))), stride_(stride) {}

        float weigh_row(float* scores, int row, int keys, int count, float scale, float& largest) {
            int16_t* to = words_ + row * stride_;
            return weigh(scores, keys, count, scale, largest, [=](int i, Vector weights) {
                const Integers whole = rounded(weights * kMostWeight);
                store_words(to + i, whole);
                return __builtin_convertvector(whole, Vector) + weights * 0.0f;  // keeps a NaN
            });
        }

        template <int kVectors>
        void sum(Sums, int count, int keys, const float* panel, float* sums) const {
            sum_value_rows<kVectors>({words_, stride_}, count, panel, ceil_div(keys, 2), sums);
        }

    private:
        int16_t* words_;
        size_t stride_;
    };
};
#endif

#ifdef PC_HAS_TILES
// Products of pairs of 16-bit floats.
struct InPairs {
    static constexpr int kBlock = 2 * kTileRows;
    static constexpr int kKeys = 512;  // they and their values stay in the cache while rows pass by
    static size_t keys_at(int key, int width) { return key / kPanel * pair_panel(width); }
    static size_t values_at(int key) { return pair_panel(key); }

    static size_t panel_floats(int keys) { return pair_panel(keys); }

    static size_t key_floats(int keys, int width) { return ceil_div(keys, kPanel) * pair_panel(width); }
    static size_t value_floats(int keys, int width) { return ceil_div(width, kPanel) * pair_panel(keys); }

    static void pack_keys(const Head& keys, float* packed) {
        const int count = round_up(keys.count, kPanel);
        const PairRows rows = room_for_pairs(count, keys.width, thread_query);
        for (int key = 0; key < count; ++key)
            rows.write(key, keys.rows.first + key * keys.rows.stride, key < keys.count ? keys.width : 0);
        for (int key = 0; key < count; key += kLanes) pack_pair_columns(rows, key, packed);
    }

    static void pack_values(const Head& values, float* packed) {
        for (int channel = 0; channel < values.width; channel += kPanel, packed += panel_floats(values.count))
            pack_pairs_of_rows(values.rows, values.count, channel, values.width, packed);
    }

    static void score(Rows query, int count, int keys, int width, const float* packed, Sums scores) {
        const PairRows rows = room_for_pairs(count, width, thread_query);
        for (int row = 0; row < count; ++row) rows.write(row, query.first + row * query.stride, width);
        for (int key = 0; key < keys; key += kPanel, packed += pair_panel(width))
            multiply_pairs<2>(rows, count, packed, {scores.first + key, scores.stride});
    }

    class Weights {
    public:
        Weights(int count, size_t stride) : rows_(room_for_pairs(count, static_cast<int>(stride), thread_words)) {}

        float weigh_row(float* scores, int row, int keys, int count, float scale, float& largest) {
            rows_.depth = count;
            uint16_t* to = rows_.first + row * rows_.stride;
            return weigh(scores, keys, count, scale, largest, [=, lower = rows_.lower](int i, Vector weights) {
                store_pair(to + i, lower, weights);
                return weights;
            });
        }

        template <int kVectors>
        void sum(Sums, int count, int, const float* panel, float* sums) const {
            multiply_pairs<kVectors>(rows_, count, panel, {sums, kPanel});
        }

    private:
        PairRows rows_;
    };
};
#endif

}  // namespace posecrafter
