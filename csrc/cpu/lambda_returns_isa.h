// SPDX-License-Identifier: Apache-2.0
// The scan itself, compiled once per instruction set: lambda_returns_isa.cpp includes this file
// inside a namespace and under the matching target pragma; it has no include guard.

// x, or 0 where the bits of `use` are 0: a select that vectorises and that no NaN passes
static inline double keep(double x, uint64_t use) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, 8);
  bits &= use;
  __builtin_memcpy(&x, &bits, 8);
  return x;
}

// K sequences of `length` tokens at once, right to left in blocks. Only the recurrence itself is
// serial, and K independent chains hide its latency; what comes before and after it vectorises.
template <int K, class W>
void scan(const Scan<W>& s, const int64_t* begin, int64_t length, const double* lam,
          double* carry) {
  constexpr int64_t kBlock = 64;
  double q[K][kBlock], u[K][kBlock], d[K][kBlock], f[K][kBlock], next[K][kBlock];
  uint64_t use[K][kBlock];  // all bits or none
  for (int64_t stop = length; stop > 0; stop -= kBlock) {
    const int64_t n = std::min(kBlock, stop);
    for (int k = 0; k < K; ++k) {
      const int64_t first = begin[k] + stop - n;
      const W *values = s.values + first, *rewards = s.rewards + first;
      if (s.mask)
        for (int64_t j = 0; j < n; ++j) use[k][j] = -uint64_t(s.mask[first + j]);
      else
        std::fill(use[k], use[k] + n, ~uint64_t(0));
      if (s.log_ratios)
        for (int64_t j = 0; j < n; ++j) q[k][j] = s.tau * s.log_ratios[first + j] + values[j];
      else
        for (int64_t j = 0; j < n; ++j) q[k][j] = values[j];
      if (s.trace)
        for (int64_t j = 0; j < n; ++j) f[k][j] = s.trace[first + j];
      else
        std::fill(f[k], f[k] + n, lam[k]);
      for (int64_t j = 0; j < n; ++j) {  // W = d + f W_next; an inactive token passes W_next on
        const double c = f[k][j], step = rewards[j] - q[k][j], sum = values[j] + c * step;
        u[k][j] = step;
        d[k][j] = keep(sum, use[k][j]);
        f[k][j] = keep(c * s.gamma, use[k][j]) + keep(1.0, ~use[k][j]);
      }
    }
    for (int64_t j = n - 1; j >= 0; --j) {
      for (int k = 0; k < K; ++k) {
        next[k][j] = carry[k];
        carry[k] = d[k][j] + f[k][j] * carry[k];
      }
    }
    for (int k = 0; k < K; ++k) {
      const int64_t first = begin[k] + stop - n;
      W* __restrict q_out = s.q ? s.q + first : nullptr;
      W* __restrict a_out = s.advantages + first;
      W* __restrict g_out = s.returns + first;
      for (int64_t j = 0; j < n; ++j) {
        const double a = u[k][j] + s.gamma * next[k][j], g = q[k][j] + s.alpha * a;
        q[k][j] = keep(q[k][j], use[k][j]);
        u[k][j] = keep(a, use[k][j]);
        d[k][j] = keep(g, use[k][j]);
      }
      if (q_out)
        for (int64_t j = 0; j < n; ++j) q_out[j] = W(q[k][j]);
      for (int64_t j = 0; j < n; ++j) a_out[j] = W(u[k][j]);
      for (int64_t j = 0; j < n; ++j) g_out[j] = W(d[k][j]);
    }
  }
}

template <class W>
static void scan_any(int k, const Scan<W>& s, const int64_t* begin, int64_t length,
                     const double* lam, double* carry) {
  if (k == kScanRows)
    scan<kScanRows>(s, begin, length, lam, carry);
  else
    for (int i = 0; i < k; ++i) scan<1>(s, begin + i, length, lam + i, carry + i);
}
