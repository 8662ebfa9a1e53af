// SPDX-License-Identifier: Apache-2.0
#include "cuda/token_logprobs.h"

#include "cuda/row_glue.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor> token_logprobs(Tensor logits, Tensor actions, MaybeTensor mask,
                                          double temperature, double softcap) {
  const char* op = "token_logprobs";
  const OnDeviceOf guard(op, "logits", logits);
  const cudaStream_t stream = current_stream(logits);
  const Rows rows = rows_of(op, logits);
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, logits, rows.count);
  const Mask use(op, mask, logits, rows.count, stream);
  Tensor logprobs = new_floats(logits, actions.sizes());
  Tensor row_stats = new_stacked(logits, 3, actions);
  RowOutputs out{};
  out.actions = ids.data, out.logprobs = floats(logprobs), out.row_stats = floats(row_stats);
  STD_CUDA_CHECK(sum_rows(rows, use.rows, {temperature, softcap}, out, stream));
  return {logprobs, row_stats};
}

// `to` may be the logits' own rows.
void run_backward(const char* op, const Tensor& grad, const Tensor& logits, const Rows& to,
                  const Tensor& actions, const MaybeTensor& mask, const Tensor& row_stats,
                  Scaling scaling) {
  const Rows rows = rows_of(op, logits);
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, logits, rows.count);
  const Array<bool> use(op, "mask", mask, ScalarType::Bool, logits, rows.count);
  const Array<float> upstream(op, "grad", grad, ScalarType::Float, logits, rows.count);
  const Array<float> stats(op, "row_stats", row_stats, ScalarType::Float, logits, 3 * rows.count);
  STD_CUDA_CHECK(logprob_gradient_rows(
      rows, to, scaling, {upstream.data, stats.data, ids.data, use.data}, current_stream(logits)));
}

Tensor token_logprobs_backward(Tensor grad, Tensor logits, Tensor actions, MaybeTensor mask,
                               Tensor row_stats, double temperature, double softcap) {
  const char* op = "token_logprobs_backward";
  const OnDeviceOf guard(op, "logits", logits);
  Tensor dlogits = new_like(logits, logits.sizes());
  run_backward(op, grad, logits, rows_of(op, dlogits), actions, mask, row_stats,
               {temperature, softcap});
  return dlogits;
}

void token_logprobs_backward_(Tensor logits, Tensor grad, Tensor actions, MaybeTensor mask,
                              Tensor row_stats, double temperature, double softcap) {
  const char* op = "token_logprobs_backward_";
  const OnDeviceOf guard(op, "logits", logits);
  run_backward(op, grad, logits, rows_of(op, logits), actions, mask, row_stats,
               {temperature, softcap});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
  m.impl("token_logprobs_backward_", TORCH_BOX(&token_logprobs_backward_));
}

}  // namespace klq::cuda
