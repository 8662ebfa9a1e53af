// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher of the LM head with a softmax: logits = hidden weight^T (+ bias), each row
// summed up on the way, the logits themselves kept only if asked for. Hopper only.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// hidden [rows, depth], weight [columns, depth] and bias [columns] are all bf16 or all f16. The
// copy engine wants depth and all strides in multiples of 16 bytes, and pointers aligned to them.
struct LinearArgs {
  Type type;
  const void *hidden, *weight, *bias;  // bias null: none
  int64_t rows, depth, columns;
  int64_t hidden_stride, weight_stride;  // elements from row to row
  const bool* mask;                      // null: all rows active
  Scaling scaling;
  // [rows, columns] in `logits_type`: before scaling and soft-cap, inactive rows too; null: none
  void* logits = nullptr;
  Type logits_type = Type::f32;  // or `type`
  int64_t logits_stride = 0;
  float* scratch = nullptr;  // linear_stats_scratch floats
};

int64_t linear_stats_scratch(int64_t rows, int64_t columns, bool entropy);

// actions, logprobs, row_stats and entropy of `out`, as sum_rows leaves them, from float32 logits.
// cudaErrorNotSupported: not a Hopper device, or not built for sm_90a.
cudaError_t linear_row_sums(const LinearArgs& args, const RowOutputs& out, cudaStream_t stream);

}  // namespace klq::cuda
