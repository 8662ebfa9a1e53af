// SPDX-License-Identifier: Apache-2.0
// The scan itself, compiled once per instruction set: lambda_returns_isa.cpp includes this file
// inside a namespace and under the matching target pragma; it has no include guard.

// K sequences of `length` tokens at once, right to left in blocks. Only the recurrence itself is
// serial, and K independent chains hide its latency; what comes before and after it vectorises.
template <int K, class W>
void scan(const Scan<W>& s, const int64_t* begin, int64_t length, const double* lam,
          double* carry) {
  constexpr int64_t kBlock = 64;
  double u[K][kBlock], d[K][kBlock], f[K][kBlock], next[K][kBlock];
  for (int64_t stop = length; stop > 0; stop -= kBlock) {
    const int64_t n = std::min(kBlock, stop);
    auto token = [&](int k, int64_t j) { return begin[k] + stop - n + j; };
    auto q_of = [&](int64_t i) {
      return s.log_ratios ? s.tau * s.log_ratios[i] + s.values[i] : double(s.values[i]);
    };
    auto active = [&](int64_t i) { return !s.mask || s.mask[i]; };
    for (int k = 0; k < K; ++k) {
      for (int64_t j = 0; j < n; ++j) {  // W = d + f W_next; an inactive token passes W_next on
        const int64_t i = token(k, j);
        const double c = s.trace ? double(s.trace[i]) : lam[k];
        u[k][j] = s.rewards[i] - q_of(i);
        d[k][j] = active(i) ? s.values[i] + c * u[k][j] : 0.0;
        f[k][j] = active(i) ? c * s.gamma : 1.0;
      }
    }
    for (int64_t j = n - 1; j >= 0; --j) {
      for (int k = 0; k < K; ++k) {
        next[k][j] = carry[k];
        carry[k] = d[k][j] + f[k][j] * carry[k];
      }
    }
    for (int k = 0; k < K; ++k) {
      W* __restrict q_out = s.q ? s.q + token(k, 0) : nullptr;
      W* __restrict a_out = s.advantages + token(k, 0);
      W* __restrict g_out = s.returns + token(k, 0);
      for (int64_t j = 0; j < n; ++j) {
        const int64_t i = token(k, j);
        const double q = q_of(i), a = u[k][j] + s.gamma * next[k][j];
        if (q_out) q_out[j] = active(i) ? W(q) : W(0);
        a_out[j] = active(i) ? W(a) : W(0);
        g_out[j] = active(i) ? W(q + s.alpha * a) : W(0);
      }
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
