// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher of the LM head's gradient of hidden states on our own product. Hopper only.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// out [rows, depth] = scale_i (dlogits weight)_i, rounded once. dlogits [rows, columns], weight
// [columns, depth] and out are bfloat16, the strides of the first two multiples of 16 bytes, their
// pointers aligned to them, out's to 4.
struct HiddenArgs {
  const void *dlogits, *weight;
  const float* scale;  // [rows], or null: 1
  int64_t rows, columns, depth;
  int64_t dlogits_stride, weight_stride, stride;  // elements from row to row; stride: of out
  void* out;
};
// cudaErrorNotSupported: not a Hopper device, or not built for sm_90a.
cudaError_t linear_hidden(const HiddenArgs& args, cudaStream_t stream);

}  // namespace klq::cuda
