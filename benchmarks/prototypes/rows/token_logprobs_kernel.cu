// SPDX-License-Identifier: Apache-2.0
#include "cuda/row_launch.cuh"
#include "cuda/token_logprobs.h"

namespace klq::cuda {
namespace {

struct TokenLogprobs {
  static constexpr bool kGrad = false;
  TokenLogprobsArgs a;

  struct Inputs {
    int64_t action;
  };
  __device__ Inputs load(int64_t r) const { return {a.actions[r]}; }
  __device__ float finish(int64_t r, const Inputs&, const RowSum& s, bool known,
                          bool writer) const {
    if (writer) {
      a.logprobs[r] = known ? s.logprob() : __int_as_float(0x7fc00000);
      a.row_stats[r] = s.max;
      a.row_stats[a.count + r] = s.rest;
      a.row_stats[2 * a.count + r] = s.chosen;
    }
    return 0.0f;
  }
  __device__ void inactive(int64_t r) const {
    a.logprobs[r] = 0.0f;
    a.row_stats[r] = a.row_stats[a.count + r] = a.row_stats[2 * a.count + r] = 0.0f;
  }
  template <class T>
  __device__ T* gradient_row(int64_t, T* row) const {
    return row;
  }
};

}  // namespace

cudaError_t token_logprobs(const Rows& rows, Scaling scaling, const TokenLogprobsArgs& args,
                           cudaStream_t stream) {
  return launch_typed(rows, scaling, TokenLogprobs{args}, stream);
}

}  // namespace klq::cuda
