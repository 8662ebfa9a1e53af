// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

struct KLQLossArgs {
  const int64_t* actions;
  const float *values, *ref_logprobs, *returns, *weights;  // weights null: 1
  const float* normalizer;                                 // device scalar
  float tau;
  float *logprobs, *residuals, *dvalues;  // [N]
  float* unscale;                         // [N], float16 only
  Rows gradient;                          // where the gradient goes; the rows themselves in place
};

cudaError_t klq_loss(const Rows& rows, Scaling scaling, const KLQLossArgs& args,
                     cudaStream_t stream);

}  // namespace klq::cuda
