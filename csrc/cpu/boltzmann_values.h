// SPDX-License-Identifier: Apache-2.0
// The Boltzmann value of one row of action values.
#pragma once
#include <vector>

#include "cpu/rows.h"

namespace klq {

// tau log sum_a pi_b e^{q / tau}; terms with q = -inf or pi_b = 0 are skipped
template <class W>
double boltzmann_row(const Row<W>& q, const Row<W>& ref, double tau) {
  const W inf = std::numeric_limits<W>::infinity(), inverse = W(1 / tau);
  const W mb = ref.max();
  W buffer[kBlock], y[kBlock];
  // y = (z_b - max_b) + q / tau, first for the max, then for the sum
  auto each = [&](auto&& body) {
    q.blocks(0, q.width, [&](const W* x, int64_t begin, int64_t n) {
      const W* z = ref.block(begin, n, buffer);
      math<W>().tilt(x, z, y, n, mb, inverse);
      body(z, n);
    });
  };
  W m = -inf;
  double s = 0, sb = 0;
  each([&](const W* z, int64_t n) {
    sb += math<W>().sum_exp(z, n, mb);
    m = std::max(m, math<W>().max(y, n));
  });
  if (!std::isfinite(m)) {
    // no finite terms to add: 0 for them, so that only a NaN shows in the sum; one of sb is in all
    // whose q is not -inf
    if (std::isnan(sb) && !(q.max() == -inf)) return sb;
    each([&](const W*, int64_t n) {
      for (int64_t j = 0; j < n; ++j) s += std::isnan(y[j]) ? y[j] : W(0);
    });
    return std::isnan(s) ? s : double(m);
  }
  each([&](const W*, int64_t n) { s += math<W>().sum_exp(y, n, m); });
  return tau * ((double(m) + std::log(s)) - std::log(sb));
}

}  // namespace klq
