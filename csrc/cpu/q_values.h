// SPDX-License-Identifier: Apache-2.0
// One row of action values, eq. (13).
#pragma once
#include "cpu/rows.h"

namespace klq {

// out = tau ((z - max - log S) - (z_b - max_b - log S_b)) + v; -inf where z is -inf
template <class W>
void q_row(const Row<W>& row, const Row<W>& ref, double tau, W v, W* out) {
  const W inf = std::numeric_limits<W>::infinity();
  const W m = row.max(), mb = ref.max();
  const W log_s = W(std::log(row.sum_exp(0, row.width, m)));
  const W log_sb = W(std::log(ref.sum_exp(0, ref.width, mb)));
  const W t = W(tau);
  W buffer[kBlock];
  row.blocks(0, row.width, [&](const W* x, int64_t begin, int64_t n) {
    const W* y = ref.block(begin, n, buffer);
    for (int64_t j = 0; j < n; ++j) {
      const W ratio = ((x[j] - m) - log_s) - ((y[j] - mb) - log_sb);
      out[begin + j] = x[j] == -inf ? -inf : t * ratio + v;
    }
  });
}

}  // namespace klq
