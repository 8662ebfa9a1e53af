// SPDX-License-Identifier: Apache-2.0
// The row op that leaves log-probs, entropy and KL behind, no gradient.
#pragma once
#include "cuda/row_launch.cuh"

namespace klq::cuda {

template <bool REF, bool MOMENTS>
struct SumRows {
  static constexpr bool kGrad = false, kRef = REF, kMoments = MOMENTS, kHeavy = REF || MOMENTS;
  static constexpr bool kSpread = !kHeavy;
  RowOutputs to;
  int64_t count;

  struct Inputs {};
  __device__ int64_t action(int64_t r) const { return to.actions[r]; }
  __device__ Inputs load(int64_t) const { return {}; }
  __device__ float finish(const RowInfo<SumRows>& info, const Sums<REF, MOMENTS>& sums,
                          const RowSum& row, const Scale& s, int who) const {
    if (who != 0) return 0.0f;
    const int64_t r = info.index;
    const float logprob = info.action >= 0 ? float(row.logprob) : not_a_number();
    if (to.logprobs) to.logprobs[r] = logprob;
    if (to.row_stats) {
      // as the backward reckons: from the maximum that comes back out of what is stored
      const float max = float(row.max / s.temperature), back = float(max * s.temperature);
      const float off = fabsf(max) < infinity() ? float((row.max - back) / s.temperature) : 0.0f;
      to.row_stats[r] = max;
      to.row_stats[count + r] = row.rest * expf(off);
      to.row_stats[2 * count + r] = float(row.chosen / s.temperature);
    }
    const RowSum ref(REF ? sums.ref_max : 0.0f, REF ? sums.ref_sum : 0.0f,
                     REF ? info.ref_chosen : 0.0f, s);
    if (REF) {
      const float ref_logprob = info.action >= 0 ? float(ref.logprob) : not_a_number();
      if (to.ref_logprobs) to.ref_logprobs[r] = ref_logprob;
      // of the rounded log-probs: policy = reference gives exactly 0
      if (to.log_ratios) to.log_ratios[r] = logprob - ref_logprob;
    }
    if constexpr (MOMENTS) {
      float entropy, kl;
      moments(sums, row, ref, s, &entropy, &kl);
      to.entropy[r] = entropy;
      if (REF) to.kl[r] = kl;
    }
    return 0.0f;
  }
  __device__ void inactive(int64_t r) const {
    if (r < 0) return;
    for (float* x : {to.logprobs, to.entropy, to.ref_logprobs, to.kl, to.log_ratios})
      if (x) x[r] = 0.0f;
    if (to.row_stats)
      for (int k = 0; k < 3; ++k) to.row_stats[k * count + r] = 0.0f;
  }
};

}  // namespace klq::cuda
