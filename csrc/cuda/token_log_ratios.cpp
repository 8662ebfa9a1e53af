// SPDX-License-Identifier: Apache-2.0
#include "cuda/row_glue.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor> token_log_ratios(Tensor logits, Tensor ref_logits, Tensor actions,
                                            MaybeTensor mask, double temperature, double softcap) {
  const char* op = "token_log_ratios";
  const OnDeviceOf guard(op, "logits", logits);
  const cudaStream_t stream = current_stream(logits);
  const Rows rows = rows_of(op, logits), ref = rows_like(op, ref_logits, logits, rows);
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, logits, rows.count);
  const Mask use(op, mask, logits, rows.count, stream);
  Tensor ratios = new_floats(logits, actions.sizes());
  Tensor row_stats = new_stacked(logits, 3, actions);
  RowOutputs out{};
  out.actions = ids.data, out.log_ratios = floats(ratios), out.row_stats = floats(row_stats);
  STD_CUDA_CHECK(sum_row_pairs(rows, ref, use.rows, {temperature, softcap}, out, stream));
  return {ratios, row_stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("token_log_ratios", TORCH_BOX(&token_log_ratios));
}

}  // namespace klq::cuda
