// SPDX-License-Identifier: Apache-2.0
// Entropy and exact KL of one row, from the log-sum-exp of target().
#pragma once
#include "cpu/token_logprobs.h"

namespace klq {

// H = log S - sum e (z - max) / S
template <class W>
double entropy(const Row<W>& row, const Target<W>& t) {
  double weighted = 0;
  row.blocks(0, row.width,
             [&](const W* x, int64_t, int64_t n) { weighted += math<W>().sum_exp_x(x, n, t.max); });
  return t.log_sum() - weighted / t.sum();
}

// KL = sum pi ((z - max) - (z_b - max_b)) - log S + log S_b; exactly 0 for identical rows
template <class W>
double divergence(const Row<W>& row, const Target<W>& t, const Row<W>& ref, const Target<W>& b) {
  double weighted = 0;
  W buffer[kBlock];
  row.blocks(0, row.width, [&](const W* x, int64_t begin, int64_t n) {
    weighted += math<W>().sum_exp_diff(x, ref.block(begin, n, buffer), n, t.max, b.max);
  });
  return weighted / t.sum() - (t.log_sum() - b.log_sum());
}

}  // namespace klq
