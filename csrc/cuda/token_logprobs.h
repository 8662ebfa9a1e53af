// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher of the log-prob's gradient; the forward is sum_rows.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

struct LogprobGradArgs {
  const float* grad;       // [count]
  const float* row_stats;  // [3, count], as sum_rows leaves them
  const int64_t* actions;
  const bool* mask;  // null: all active
};

// gradient = grad * (onehot - softmax) * dz'/dz; 0 in inactive rows, whose logits are not read
cudaError_t logprob_gradient_rows(const Rows& rows, const Rows& gradient, Scaling scaling,
                                  const LogprobGradArgs& args, cudaStream_t stream);

}  // namespace klq::cuda
