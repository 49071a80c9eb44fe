// Attention of tokens on x86-64, in float32, or with its products in 8 and 16 bits, or of pairs of 16-bit floats. Layer
// 4: knows neither Python nor any library's tensors or threads.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace posecrafter {

// Tokens (batch, rows, places, heads · width), whose channels begin at `first` and are `stride` floats apart from one
// token to the next: they may be part of wider ones.
struct Tokens {
    const float* first;
    size_t stride;
};

// out = softmax(query · keyᵀ / √width) · value of each head, over the rows of each place: those of a frame's tokens, at
// one place, or of the same token in several frames, at many. out is compact.
struct Attention {
    Tokens query, key, value;
    Tokens own_key, own_value;  // the last of the keys, where given: a row apart from the others, with a mask
    const char* mask;           // (batch, keys), not 0: which keys there are; nullptr: all
    float* out;
    int batch, queries, keys, places, heads, width;
};

// threads: how many work at it at best.
void attention(const Attention& call, int threads, const Parallel& parallel);

// The same with scores from products in eight bits: each query rounded to the 255th part of what lies between its least
// number and its most, each key to the 127th part of its largest. Means are sums in integers, of weights rounded to the
// 2¹⁴th part of a row's largest and values to the 511th part of their channel's. At several places, and with a mask,
// all is in float32. The width is a multiple of four.
void attention_bytes(const Attention& call, int threads, const Parallel& parallel);

// The same with products of pairs of 16-bit floats, see pairs.h, where this process may use tiles.
void attention_pairs(const Attention& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
