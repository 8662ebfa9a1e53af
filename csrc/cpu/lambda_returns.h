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

constexpr int kScanRows = 4;

// k <= kScanRows sequences of `length` tokens that begin at `begin`; `carry` holds their
// bootstraps.
template <class W>
using ScanFunction = void (*)(int k, const Scan<W>& s, const int64_t* begin, int64_t length,
                              const double* lam, double* carry);

// The scan for this machine's instruction set.
template <class W>
ScanFunction<W> scan_function();

}  // namespace klq
