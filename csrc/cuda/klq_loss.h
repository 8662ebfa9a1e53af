// SPDX-License-Identifier: Apache-2.0
// Torch-free launchers of the KLQ loss, eq. (6).
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

struct KLQLossArgs {
  const int64_t* actions;
  const float *values, *ref_logprobs, *returns, *weights;  // weights null: 1
  const float* normalizer;                                 // device scalar; null: active rows
  double tau;
  float *logprobs, *residuals;  // [count], what the sum is made of
  float *dvalues, *unscale;     // [count], null: no gradient wanted; unscale for float16 only
  float *loss, *stats;          // [], [4]
};

// `gradient` null: loss only. It may be the rows themselves.
cudaError_t klq_loss_rows(const Rows& rows, const Rows* gradient, const bool* mask,
                          const ActiveRows& active, Scaling scaling, const KLQLossArgs& args,
                          cudaStream_t stream);

// The loss of log-probs that are known, and the gradients by them and by the values: what
// klq_loss_rows leaves, of args.logprobs; args.residuals becomes the gradient by log-probs.
cudaError_t loss_of_tokens(const bool* mask, const ActiveRows& active, int64_t count,
                           const KLQLossArgs& args, cudaStream_t stream);

// gradient *= upstream * unscale[row]; unscale null: 1
cudaError_t scale_rows(const Rows& gradient, const float* unscale, const float* upstream,
                       cudaStream_t stream);

}  // namespace klq::cuda
