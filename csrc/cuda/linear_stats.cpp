// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_glue.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear_stats(Tensor hidden, Tensor weight, MaybeTensor bias,
                                                Tensor actions, MaybeTensor mask,
                                                double temperature, double softcap, bool entropy) {
  const char* op = "linear_stats";
  const OnDeviceOf guard(op, "hidden", hidden);
  HeadInputs in(op, hidden, weight, bias, actions, mask, {temperature, softcap});
  in.allot(hidden, linear_stats_scratch(in.args.rows, in.args.columns, entropy));
  Tensor logprobs = new_vector(hidden, in.args.rows);
  Tensor row_stats = new_stacked(hidden, 3, actions);
  Tensor moments = new_vector(hidden, entropy ? in.args.rows : 0);
  RowOutputs out{};
  out.actions = in.actions.data, out.logprobs = floats(logprobs);
  out.row_stats = floats(row_stats), out.entropy = entropy ? floats(moments) : nullptr;
  STD_CUDA_CHECK(linear_row_sums(in.args, out, current_stream(hidden)));
  return {logprobs, row_stats, moments};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("linear_stats", TORCH_BOX(&linear_stats)); }

}  // namespace klq::cuda
