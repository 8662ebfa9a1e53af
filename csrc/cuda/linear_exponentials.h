// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher of the LM head with its softmax stored in place of its logits. Hopper only.
#pragma once
#include "cuda/linear_stats.h"

namespace klq::cuda {

// Of args.logits [rows, columns], bfloat16, row i becomes E_i, and factors[i] = s_i, with
//
//   s_i E_i = (onehot(action) - softmax) * dz'/dz      the gradient of the row's log-prob by logits
//
// so that a loss with gradient g_i by log-prob i needs no pass over the rows: dH = diag(g s) E W
// and dW = E^T diag(g s) H are the head's plain products with factors a row. What is stored, off
// the action's column, is e^(z'_ij - z'_ref) of a reference near the action's logit, from float32
// logits; rounded once, like a stored gradient. Where a row's exponentials would leave the range
// of floats, the product is run again with better references, which only the device decides.
//
// Inactive rows: logprobs and factors are 0, E is finite if the row of `hidden` is.
// args.scratch: linear_exponentials_scratch floats. Strides and pointers as in linear_stats.
int64_t linear_exponentials_scratch(int64_t rows, int64_t columns);
cudaError_t linear_exponentials(const LinearArgs& args, const int64_t* actions, float* logprobs,
                                float* factors, cudaStream_t stream);

}  // namespace klq::cuda
