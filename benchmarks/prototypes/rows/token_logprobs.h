// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

struct TokenLogprobsArgs {
  const int64_t* actions;
  float* logprobs;   // [N]
  float* row_stats;  // [3, N]: max, sum without the chosen term, chosen logit, all scaled
  int64_t count;
};

cudaError_t token_logprobs(const Rows& rows, Scaling scaling, const TokenLogprobsArgs& args,
                           cudaStream_t stream);

}  // namespace klq::cuda
