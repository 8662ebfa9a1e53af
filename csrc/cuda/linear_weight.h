// SPDX-License-Identifier: Apache-2.0
// Torch-free launchers of the LM head's weight gradient on our own product. Hopper only.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// out [columns, depth], float32, = dlogits^T hidden, or out += that. dlogits [rows, columns] and
// hidden [rows, depth] are bfloat16, their strides multiples of 16 bytes, their pointers aligned to
// them. Every element of out is touched once: the same bits every time.
struct WeightArgs {
  const void *dlogits, *hidden;
  int64_t rows, columns, depth;
  int64_t dlogits_stride, hidden_stride, stride;  // elements from row to row; stride: of out
  float* out;
  bool add;
};
// cudaErrorNotSupported: not a Hopper device, or not built for sm_90a.
cudaError_t linear_weight(const WeightArgs& args, cudaStream_t stream);

// The product takes dlogits = scale E as E and bfloat16(scale hidden), one rounding more than a
// stored gradient has. Where one token's row is all there is in a row of dW, its action's, nothing
// averages that out: this adds what is missing there,
//
//   out[action] += scale own hidden - bfloat16(own) bfloat16(scale hidden)
//
// of all tokens of an action one after the other, by one block: the same bits every time. `own` is
// E at the action before it is rounded, 0 in inactive rows, whose hidden is not read.
struct ChosenArgs {
  const void* hidden;      // [rows, depth], bfloat16
  const int64_t* order;    // [rows]: rows by action, stable
  const int32_t* actions;  // [rows], in that order, all rows of out
  const float *scale, *own;
  int64_t rows, depth, hidden_stride, stride;
  float* out;
};
cudaError_t linear_chosen(const ChosenArgs& args, cudaStream_t stream);

}  // namespace klq::cuda
