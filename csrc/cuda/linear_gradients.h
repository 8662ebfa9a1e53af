// SPDX-License-Identifier: Apache-2.0
// Torch-free launchers of the LM head's two gradients from that of its logits. Hopper only; sizes,
// strides and pointers as in linear_stats.h.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// `dlogits` [rows, columns], `hidden` [rows, depth] and `weight` [columns, depth] are all bf16 or
// all f16; strides in elements from row to row.
struct LinearGradientArgs {
  Type type;
  int64_t rows, depth, columns;
  const void* dlogits;
  int64_t dlogits_stride;
};

// out [rows, depth] in `type` = dlogits weight
cudaError_t hidden_gradient(const LinearGradientArgs& args, const void* weight,
                            int64_t weight_stride, void* out, int64_t out_stride,
                            cudaStream_t stream);
// out [columns, depth] float32 = dlogits^T hidden, or `add`ed to what is there. Inactive rows must
// be 0 in both: 0 times NaN is NaN.
cudaError_t weight_gradient(const LinearGradientArgs& args, const void* hidden,
                            int64_t hidden_stride, float* out, int64_t out_stride, bool add,
                            cudaStream_t stream);

}  // namespace klq::cuda
