// SPDX-License-Identifier: Apache-2.0
// Rows of logits in memory, and the walk over a row in blocks of the working precision.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/math.h"

namespace klq {

// count rows of width elements; row i starts outer_stride * (i / inner) + inner_stride * (i %
// inner) elements after data. Offsets are 64-bit throughout.
struct Rows {
  char* data = nullptr;
  Type type = Type::f32;
  int64_t size = 4;  // bytes an element
  int64_t count = 0, width = 0;
  int64_t inner = 1, inner_stride = 0, outer_stride = 0;

  char* row(int64_t i) const {
    return data + size * ((i / inner) * outer_stride + (i % inner) * inner_stride);
  }
};

// One row, read in the working precision W with the scaling applied.
template <class W>
struct Row {
  const char* data;
  Type type;
  int64_t size, width;
  Scaling scaling;

  Row(const Rows& rows, int64_t i, Scaling s)
      : data(rows.row(i)), type(rows.type), size(rows.size), width(rows.width), scaling(s) {}

  // Elements [begin, begin + n) of the scaled row: in place where memory already holds them, else
  // through `buffer`.
  const W* block(int64_t begin, int64_t n, W* buffer) const {
    const char* p = data + size * begin;
    const bool as_is = type == (sizeof(W) == 8 ? Type::f64 : Type::f32);
    const bool aligned = reinterpret_cast<uintptr_t>(p) % alignof(W) == 0;
    if (as_is && aligned && scaling.identity()) return reinterpret_cast<const W*>(p);
    math<W>().read(type, p, buffer, n);
    if (!scaling.identity()) math<W>().scale(buffer, n, scaling);
    return buffer;
  }

  W at(int64_t i) const {
    W buffer[kBlock];
    return *block(i, 1, buffer);
  }

  W max() const {
    W top = -std::numeric_limits<W>::infinity();
    blocks(0, width,
           [&](const W* x, int64_t, int64_t n) { top = std::max(top, math<W>().max(x, n)); });
    return top;
  }

  // body(x, begin, n) over the blocks of [from, to)
  template <class Body>
  void blocks(int64_t from, int64_t to, const Body& body) const {
    W buffer[kBlock];
    for (int64_t b = from; b < to; b += kBlock) {
      const int64_t n = std::min(kBlock, to - b);
      body(block(b, n, buffer), b, n);
    }
  }

  // sum of exp(z - m) over [from, to); blocks are added up in double
  double sum_exp(int64_t from, int64_t to, W m) const {
    double s = 0;
    blocks(from, to, [&](const W* x, int64_t, int64_t n) { s += math<W>().sum_exp(x, n, m); });
    return s;
  }
};

}  // namespace klq
