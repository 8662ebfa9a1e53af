// SPDX-License-Identifier: Apache-2.0
#include "cuda/klq_loss.h"
#include "cuda/row_launch.cuh"

namespace klq::cuda {
namespace {

struct KLQLoss {
  static constexpr bool kGrad = true;
  KLQLossArgs a;
  float largest_slope;  // max(1, 1 / temperature)

  struct Inputs {
    int64_t action;
    float value, ref_logprob, target, weight, normalizer;
  };
  __device__ Inputs load(int64_t r) const {
    return {
        a.actions[r], a.values[r], a.ref_logprobs[r], a.returns[r], a.weights ? a.weights[r] : 1.0f,
        *a.normalizer};
  }
  __device__ float finish(int64_t r, const Inputs& in, const RowSum& s, bool known,
                          bool writer) const {
    const float logprob = known ? s.logprob() : __int_as_float(0x7fc00000);
    const float residual = a.tau * (logprob - in.ref_logprob) + in.value - in.target;
    const float dq = 2.0f * in.weight * residual / in.normalizer;
    float coefficient = a.tau * dq, undo = 1.0f;
    if (a.unscale) {
      // float16: the coefficient is brought to 2^14 by a power of two that the backward undoes, so
      // that nothing flushes to zero before the loss scale is known
      const float largest = fabsf(coefficient) * largest_slope;
      if (largest > 0.0f && largest < __int_as_float(0x7f800000)) {
        const int shift = min(max(14 - ilogbf(largest), -100), 100);
        coefficient = ldexpf(coefficient, shift);
        undo = ldexpf(1.0f, -shift);
      }
    }
    if (writer) {
      a.logprobs[r] = logprob, a.residuals[r] = residual, a.dvalues[r] = dq;
      if (a.unscale) a.unscale[r] = undo;
    }
    return coefficient;
  }
  __device__ void inactive(int64_t r) const {
    a.logprobs[r] = a.residuals[r] = a.dvalues[r] = 0.0f;
    if (a.unscale) a.unscale[r] = 1.0f;
  }
  template <class T>
  __device__ T* gradient_row(int64_t r, T*) const {
    return row_of<T>(a.gradient, r);
  }
};

}  // namespace

cudaError_t klq_loss(const Rows& rows, Scaling scaling, const KLQLossArgs& args,
                     cudaStream_t stream) {
  const float largest_slope = float(scaling.temperature < 1 ? 1 / scaling.temperature : 1);
  return launch_typed(rows, scaling, KLQLoss{args, largest_slope}, stream);
}

}  // namespace klq::cuda
