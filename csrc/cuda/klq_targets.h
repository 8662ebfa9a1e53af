// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher of logits to targets in one kernel.
#pragma once
#include "cuda/lambda_returns.h"
#include "cuda/rows.h"

namespace klq::cuda {

struct TargetArgs {
  const int64_t* actions;
  const float* cached;  // the reference's log-probs; null: its rows are read
  float *logprobs, *ref_logprobs, *log_ratios;
  int32_t* arrived;  // [sequences], zero before
  // over log_ratios; all inputs float32 and aligned for vectors, the mask for four bytes
  ScanArgs scan;
};

cudaError_t target_rows(const Rows& rows, const Rows* ref, const ActiveRows& active,
                        Scaling scaling, const TargetArgs& args, cudaStream_t stream);

}  // namespace klq::cuda
