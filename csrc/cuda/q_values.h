// SPDX-License-Identifier: Apache-2.0
// Torch-free launchers of the full-vocabulary values, eq. (13) and its Boltzmann value.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// q = tau (log pi - log pi_b) + values[row], [count, width] contiguous
cudaError_t q_value_rows(const Rows& rows, const Rows& ref, Scaling scaling, float tau,
                         const float* values, float* q, cudaStream_t stream);

// values = tau log sum_a pi_b e^{q / tau}; the scaling is the reference's
cudaError_t boltzmann_rows(const Rows& q, const Rows& ref, Scaling scaling, float tau,
                           float* values, cudaStream_t stream);

}  // namespace klq::cuda
