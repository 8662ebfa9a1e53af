// SPDX-License-Identifier: Apache-2.0
// One row of action values, eq. (13).
#pragma once
#include "cpu/rows.h"

namespace klq {

// out = tau ((z - max - log S) - (z_b - max_b - log S_b)) + v; -inf where z is -inf
template <class W>
void q_row(const Row<W>& row, const Row<W>& ref, double tau, W v, W* out) {
  const W m = row.max(), mb = ref.max();
  const double s = row.sum_exp(0, row.width, m), sb = ref.sum_exp(0, ref.width, mb);
  const W log_ratio = W(std::log(s)) - W(std::log(sb));
  W buffer[kBlock];
  row.blocks(0, row.width, [&](const W* x, int64_t begin, int64_t n) {
    const W* y = ref.block(begin, n, buffer);
    math<W>().scaled_diff(x, y, out + begin, n, m, mb, log_ratio, W(tau), v);
  });
}

}  // namespace klq
