// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher of the reverse scan; shared by lambda_returns and gae.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace klq::cuda {

struct ScanArgs {
  const float *log_ratios, *values, *rewards;  // log_ratios null: Q = V (GAE)
  const float *trace, *lam_rows, *bootstrap;   // null: lam, lam, 0
  const bool* mask;                            // null: all active
  const int64_t* cu_seqlens;                   // null: padded rows of `length` tokens
  int64_t sequences, length, tokens;
  double tau, gamma, lam, alpha;
  float *q, *advantages, *returns;  // q null: not wanted
};

// Enqueues on `stream`; returns the launch's error code. Nothing to do is no launch.
cudaError_t scan(const ScanArgs& args, cudaStream_t stream);

}  // namespace klq::cuda
