// SPDX-License-Identifier: Apache-2.0
// Torch-free launchers of the LM head's weight gradient on our own product. Hopper only.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// out [columns, depth], contiguous, of Type::f32 = dlogits^T hidden, or out += that; or of
// Type::bf16, rounded once, of dlogits^T hidden and, in rows v whose slots[v] >= 0, extra[slots[v]]
// [.., depth]. dlogits [rows, columns] and hidden [rows, depth] are bfloat16. All strides are
// multiples of 16 bytes, pointers aligned to them. Every element of out is touched once: the same
// bits every time.
struct WeightArgs {
  const void *dlogits, *hidden;
  int64_t rows, columns, depth;
  int64_t dlogits_stride, hidden_stride;  // elements from row to row
  Type type;
  void* out;
  bool add;
  const int32_t* slots;  // [columns] at least, or null: nothing extra
  const float* extra;
};
// cudaErrorNotSupported: not a Hopper device, or not built for sm_90a.
cudaError_t linear_weight(const WeightArgs& args, cudaStream_t stream);

// The product takes dlogits = scale E as E and bfloat16(scale hidden), one rounding more than a
// stored gradient has. Where one token's row is all there is in a row of dW, its action's, nothing
// averages that out: what is missing there is
//
//   scale own hidden - bfloat16(own) bfloat16(scale hidden)
//
// of all tokens of an action one after the other, by one block: the same bits every time. `own` is
// E at the action before it is rounded, 0 in inactive rows, whose hidden is not read. It is added
// to out[action]; or, `apart`, becomes out[i], i the first token of the action. The bias's
// gradient, a sum of scale E, lacks scale (own - bfloat16(own)) there.
struct ChosenArgs {
  const void* hidden;      // [rows, depth], bfloat16
  const int64_t* actions;  // [rows]; those outside of 0 to columns are passed over
  const float *scale, *own;
  int64_t rows, columns, depth, hidden_stride;
  float* out;  // null: not wanted
  bool apart;
  float* bias;     // [columns], added to; null: not wanted
  int32_t* slots;  // [2, columns], written: the first token of each action or -1; how many but one
};
cudaError_t linear_chosen(const ChosenArgs& args, cudaStream_t stream);

}  // namespace klq::cuda
