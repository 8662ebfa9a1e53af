// SPDX-License-Identifier: Apache-2.0
// One row's log-prob of the chosen token, and its gradient.
//
// A row is summed up in three numbers: its max, rest = sum over the *other* tokens of exp(z - max),
// and the chosen token's z. Keeping the chosen term out of the sum keeps 1 - p exact when p is
// close to 1, in the log-prob (log1p(rest)) and in the gradient (rest / sum).
#pragma once
#include "cpu/rows.h"

namespace klq {

template <class W>
struct Target {
  W max, rest, z;

  double sum() const { return rest + std::exp(double(z) - double(max)); }
  double log_sum() const { return z == max ? std::log1p(double(rest)) : std::log(sum()); }
  // log pi = (z - max) - log sum; NaN where the row's max is not finite
  double logprob() const {
    if (!std::isfinite(max)) return std::numeric_limits<double>::quiet_NaN();
    return (double(z) - double(max)) - log_sum();
  }
};

// log pi of `action` as a result of the op: NaN for an id that is none of the row's columns
template <class W>
double logprob_of(const Target<W>& t, int64_t action, int64_t width) {
  return action >= 0 && action < width ? t.logprob() : std::numeric_limits<double>::quiet_NaN();
}

// `action` outside [0, V) means that the token is none of this row: z is -inf.
template <class W>
Target<W> target(const Row<W>& row, int64_t action) {
  const W inf = std::numeric_limits<W>::infinity();
  const W m = row.max();
  const W point = m == -inf ? W(0) : m;  // -inf - -inf would hide that there is no NaN in the row
  if (action < 0 || action >= row.width) return {m, W(row.sum_exp(0, row.width, point)), -inf};
  const double rest = row.sum_exp(0, action, point) + row.sum_exp(action + 1, row.width, point);
  return {m, W(rest), row.at(action)};
}

// out = coefficient * (onehot(action) - softmax) * dz/dlogits; out may be the row itself.
// Banned tokens (-inf) get 0, the chosen one included.
template <class W>
void gradient(const Row<W>& row, int64_t action, const Target<W>& t, double coefficient,
              char* out) {
  const Scaling s = row.scaling;
  const double inverse = s.softcap ? 1.0 : 1.0 / s.temperature;
  const double total = t.sum();
  const W scale = W(-coefficient * inverse / total);
  const bool here = action >= 0 && action < row.width;
  W chosen = t.z == -std::numeric_limits<W>::infinity()
                 ? W(0)
                 : W(coefficient * inverse * (t.rest / total));
  W product[kBlock], logit[kBlock];
  auto times_slope = [&](W* y, int64_t begin, int64_t n) {
    if (!s.softcap) return;
    math<W>().read(row.type, row.data + row.size * begin, logit, n);
    math<W>().slope(logit, y, n, s);
  };
  if (here) times_slope(&chosen, action, 1);  // before its logit is overwritten
  row.blocks(0, row.width, [&](const W* x, int64_t begin, int64_t n) {
    math<W>().exp_times(x, product, n, t.max, scale);
    times_slope(product, begin, n);
    math<W>().write(row.type, product, out + row.size * begin, n);
  });
  if (!here) return;
  math<W>().write(row.type, &chosen, out + row.size * action, 1);
}

inline void zero_row(const Rows& rows, int64_t i) {
  std::memset(rows.row(i), 0, rows.size * rows.width);
}

}  // namespace klq
