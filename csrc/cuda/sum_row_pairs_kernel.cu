// SPDX-License-Identifier: Apache-2.0
#include "cuda/sum_rows.cuh"

namespace klq::cuda {

cudaError_t sum_row_pairs(const Rows& rows, const Rows& ref, const ActiveRows& active,
                          Scaling scaling, const RowOutputs& out, cudaStream_t stream) {
  const RowSet set{rows, &ref, nullptr, active};
  return out.entropy ? launch(set, scaling, SumRows<true, true>{out, rows.count}, stream)
                     : launch(set, scaling, SumRows<true, false>{out, rows.count}, stream);
}

}  // namespace klq::cuda
