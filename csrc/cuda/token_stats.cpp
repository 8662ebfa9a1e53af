// SPDX-License-Identifier: Apache-2.0
#include "cuda/row_glue.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor actions,
                                                       MaybeTensor ref_logits, MaybeTensor mask,
                                                       double temperature, double softcap) {
  const char* op = "token_stats";
  const OnDeviceOf guard(op, "logits", logits);
  const cudaStream_t stream = current_stream(logits);
  const Rows rows = rows_of(op, logits);
  const Rows ref = ref_logits ? rows_like(op, *ref_logits, logits, rows) : Rows{};
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, logits, rows.count);
  const Mask use(op, mask, logits, rows.count, stream);
  const bool both = ref_logits.has_value();
  Tensor logprobs = new_tokens(logits, actions, true), entropy = new_tokens(logits, actions, true);
  Tensor ref_logprobs = new_tokens(logits, actions, both), kl = new_tokens(logits, actions, both);
  RowOutputs out{};
  out.actions = ids.data, out.logprobs = floats(logprobs), out.entropy = floats(entropy);
  if (ref_logits) {
    out.ref_logprobs = floats(ref_logprobs), out.kl = floats(kl);
    STD_CUDA_CHECK(sum_row_pairs(rows, ref, use.rows, {temperature, softcap}, out, stream));
  } else {
    STD_CUDA_CHECK(sum_rows(rows, use.rows, {temperature, softcap}, out, stream));
  }
  return {logprobs, entropy, ref_logprobs, kl};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("token_stats", TORCH_BOX(&token_stats)); }

}  // namespace klq::cuda
