// Attention of tokens on x86-64: in float32, with products in 8 and 16 bits, or with products of pairs of 16-bit
// floats. Layer 4: knows neither Python nor any library's tensors or threads.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace posecrafter {

// Tokens (batch, rows, places, heads · width). Their channels begin at `first`, and are `stride` floats apart from one
// token to the next, so the tokens may be part of wider ones.
struct Tokens {
    const float* first;
    size_t stride;
};

// out = softmax(query · keyᵀ / √width) · value for each head, over the rows of each place. With one place, rows are the
// tokens of a frame; with many, they are the same token in several frames. out is compact.
struct Attention {
    Tokens query, key, value;
    Tokens own_key, own_value;  // the last key and its value, if given, which are stored apart; only with a mask
    const char* mask;           // (batch, keys), not 0 for keys that are there; nullptr: all are
    float* out;
    int batch, queries, keys, places, heads, width;
};

// threads: the most threads that can work on it.
void attention(const Attention& call, int threads, const Parallel& parallel);

// The same with scores from 8-bit products. Each query is rounded to 1/255 of the range between its least and its
// largest number, each key to 1/127 of its largest magnitude. Means are integer sums: weights are rounded to 1/(2¹⁴-1)
// of a row's largest, values to 1/511 of their channel's. With several places or a mask, everything is in float32. The
// width is a multiple of four.
void attention_bytes(const Attention& call, int threads, const Parallel& parallel);

// The same with products of pairs of 16-bit floats (see pairs.h). With several places, with a mask, or if this process
// may not use tiles, everything is in float32.
void attention_pairs(const Attention& call, int threads, const Parallel& parallel);

}  // namespace posecrafter
