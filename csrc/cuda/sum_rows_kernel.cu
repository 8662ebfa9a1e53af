// SPDX-License-Identifier: Apache-2.0
#include "cuda/sum_rows.cuh"

namespace klq::cuda {

cudaError_t sum_rows(const Rows& rows, const ActiveRows& active, Scaling scaling,
                     const RowOutputs& out, cudaStream_t stream) {
  const RowSet set{rows, nullptr, nullptr, active};
  return out.entropy ? launch(set, scaling, SumRows<false, true>{out, rows.count}, stream)
                     : launch(set, scaling, SumRows<false, false>{out, rows.count}, stream);
}

}  // namespace klq::cuda
