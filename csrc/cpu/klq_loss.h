// SPDX-License-Identifier: Apache-2.0
// One token of the KLQ loss, eq. (6): residual and row gradient while the row is in cache.
#pragma once
#include "cpu/token_logprobs.h"

namespace klq {

struct Residual {
  double logprob, residual;
};

// Stores the row's gradient at `out`. In float16 it carries a power of two that brings the
// coefficient to 2^14, so that nothing flushes to zero before the loss scale is known; the returned
// factor undoes it. 1 otherwise.
template <class W>
float loss_gradient(const Row<W>& row, int64_t action, const Target<W>& t, double coefficient,
                    char* out) {
  int shift = 0;
  if (row.type == Type::f16 && std::isfinite(coefficient) && coefficient != 0) {
    const double largest = std::abs(coefficient) * std::max(1.0, 1.0 / row.scaling.temperature);
    shift = std::clamp(14 - std::ilogb(largest), -100, 100);
  }
  gradient(row, action, t, std::ldexp(coefficient, shift), out);
  return std::ldexp(1.0f, -shift);
}

}  // namespace klq
