// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher of the LM head with a softmax on our own product, logits = hidden weight^T
// (+ bias): every row is summed up in float32 while it is in registers. Hopper only.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// hidden [rows, depth], weight [columns, depth], bias [columns] and out [rows, columns] are
// bfloat16. The copy engine wants depth and all strides in multiples of 16 bytes, and pointers
// aligned to them; of out it writes whole units of 16 bytes.
struct Head {
  const void *hidden, *weight, *bias;  // bias null: none
  int64_t rows, depth, columns;
  int64_t hidden_stride, weight_stride;  // elements from row to row
  const int64_t* actions;
  Scaling scaling;
  void* out;       // null: nothing of size rows x columns is stored
  int64_t stride;  // of out
};

struct LinearRows {
  Head head;
  const bool* mask;           // null: all rows active
  float* scratch;             // linear_rows_scratch floats
  float *logprobs, *entropy;  // [rows]; entropy null: not wanted
  float* row_stats;           // [3, rows]: factor, own, reference
};

// Row i of out becomes E_i and row_stats s_i, o_i and r_i, with
//
//   s_i E_i = (onehot(action) - softmax) * dz'/dz      the gradient of the row's log-prob by logits
//
// so that a loss with gradient g_i by log-prob i needs no pass over the rows: dH = diag(g s) E W
// and dW = E^T diag(g s) H are the head's plain products with factors a row. What is stored, off
// the action's column, is e^(z'_ij - z'_ref) of a reference near the action's logit, rounded once,
// like a stored gradient; o_i is E_i at the action before it is rounded, r_i the reference before
// the temperature. Where a row's exponentials would leave the range of floats, the product is run
// again with better references, which only the device decides.
//
// Inactive rows: logprobs, entropy, factor and own are 0, the reference infinity, and E is 0 if the
// row of hidden is finite.
// cudaErrorNotSupported: not a Hopper device, or not built for sm_90a.
int64_t linear_rows_scratch(int64_t rows, int64_t columns, bool entropy);
cudaError_t linear_rows(const LinearRows& args, cudaStream_t stream);

// out = diag(scale) E from what linear_rows left, rounded once: with scale = g s the gradient of
// the logits itself.
struct LinearDlogits {
  Head head;
  const float *scale, *own, *reference;  // [rows]
};
cudaError_t linear_dlogits(const LinearDlogits& args, cudaStream_t stream);

}  // namespace klq::cuda
