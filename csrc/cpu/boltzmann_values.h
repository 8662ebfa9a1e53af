// SPDX-License-Identifier: Apache-2.0
// The Boltzmann value of one row of action values.
#pragma once
#include <vector>

#include "cpu/rows.h"

namespace klq {

// tau log sum_a pi_b e^{q / tau}; terms with q = -inf or pi_b = 0 are skipped
template <class W>
double boltzmann_row(const Row<W>& q, const Row<W>& ref, double tau) {
  const W inf = std::numeric_limits<W>::infinity();
  const W mb = ref.max(), inverse = W(1 / tau);
  const W log_sb = W(std::log(ref.sum_exp(0, ref.width, mb)));
  W buffer[kBlock], y[kBlock];
  // y = log pi_b + q / tau, first for the max, then for the sum
  auto each = [&](auto&& body) {
    q.blocks(0, q.width, [&](const W* x, int64_t begin, int64_t n) {
      const W* z = ref.block(begin, n, buffer);
      for (int64_t j = 0; j < n; ++j) {
        const W sum = ((z[j] - mb) - log_sb) + x[j] * inverse;
        y[j] = x[j] == -inf || z[j] == -inf ? -inf : sum;
      }
      body(n);
    });
  };
  W m = -inf;
  double s = 0;
  each([&](int64_t n) { m = std::max(m, math<W>().max(y, n)); });
  // an infinite max has no finite terms to add: pass 0 on, so that only a NaN shows in the sum
  const W top = std::isfinite(m) ? m : W(0);
  each([&](int64_t n) {
    for (int64_t j = 0; j < n; ++j) y[j] = y[j] == inf ? W(0) : y[j];
    s += math<W>().sum_exp(y, n, top);
  });
  if (!std::isfinite(m)) return std::isnan(s) ? s : double(m);
  return tau * (double(m) + std::log(s));
}

}  // namespace klq
