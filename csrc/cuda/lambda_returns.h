// SPDX-License-Identifier: Apache-2.0
// Torch-free launchers of the reverse scan (lambda_returns, gae) and of place_scores.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/types.h"

namespace klq::cuda {

// A floating input, contiguous; null data: absent.
struct Reals {
  const void* data = nullptr;
  Type type = Type::f32;
  bool vector = false;  // four tokens may be read as one: the pointer is aligned for it
};

// Which tokens form a sequence: rows of `length`, or cu_seqlens [count + 1] where that is given.
struct Sequences {
  const void* ends = nullptr;
  bool wide_ends = false;  // int64, not int32
  int64_t count = 0, length = 0, tokens = 0;
};

struct ScanArgs {
  Sequences seqs;
  Reals log_ratios, values, rewards;  // no log_ratios: Q = V (GAE)
  Reals trace, lam_rows, bootstrap;   // absent: lam, lam, 0
  const uint8_t* mask = nullptr;      // null: all active
  bool mask_vector = false;
  double tau = 0, gamma = 1, lam = 1, alpha = 1;
  float *q = nullptr, *advantages = nullptr, *returns = nullptr;  // q null: not wanted
  bool outputs_vector = true;  // all are aligned for four at a time
};

// How a scan is laid out, from shapes and the kind of device.
struct ScanPlan {
  int lanes = 0;        // lanes a row, or
  int warps = 0;        // warps a block, a block a row, or
  int64_t span = 0;     // tokens a block, flat
  int parts = 0;        // spans a row; 0: packed
  int64_t blocks = 0;   // all of them
  int64_t scratch = 0;  // doubles of scratch, all written before they are read
};
ScanPlan plan_scan(const Sequences& seqs);

// Enqueue on `stream`; return the launch's error code. Nothing to do is no launch.
cudaError_t launch_scan(const ScanArgs& args, const ScanPlan& plan, double* scratch,
                        cudaStream_t stream);
// Fills all of `rewards`.
cudaError_t launch_place_scores(const Sequences& seqs, const Reals& scores, const uint8_t* mask,
                                float* rewards, cudaStream_t stream);

}  // namespace klq::cuda
