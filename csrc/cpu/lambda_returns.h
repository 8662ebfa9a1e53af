// SPDX-License-Identifier: Apache-2.0
// The reverse scan of eq. (7) in its W form: with W_t = V_t + c_t A_t,
//
//   A_t = (r_t - Q_t) + gamma W_next,
//
// where W_next is the carry from the next active token and the bootstrap is simply the first carry.
// The carry is double, which makes the powers of gamma lambda exact enough at any length.
#pragma once
#include <cstdint>

namespace klq {

template <class W>
struct Scan {
  const W *log_ratios, *values, *rewards;  // log_ratios null: Q = V (GAE)
  const W* trace;                          // null: lam
  const bool* mask;                        // null: all active
  double tau, gamma, alpha;
  W *q, *advantages, *returns;  // q null: not wanted
};

// K sequences of `length` tokens at once, right to left; K independent chains hide the latency of
// the recurrence.
template <int K, class W>
void scan(const Scan<W>& s, const int64_t* begin, int64_t length, const double* lam,
          double* carry) {
  for (int64_t t = length - 1; t >= 0; --t) {
    for (int k = 0; k < K; ++k) {
      const int64_t i = begin[k] + t;
      if (s.mask && !s.mask[i]) {
        if (s.q) s.q[i] = 0;
        s.advantages[i] = s.returns[i] = 0;
        continue;
      }
      const double v = s.values[i];
      const double q = s.log_ratios ? s.tau * s.log_ratios[i] + v : v;
      const double a = (s.rewards[i] - q) + s.gamma * carry[k];
      carry[k] = v + (s.trace ? double(s.trace[i]) : lam[k]) * a;
      if (s.q) s.q[i] = W(q);
      s.advantages[i] = W(a);
      s.returns[i] = W(q + s.alpha * a);
    }
  }
}

}  // namespace klq
