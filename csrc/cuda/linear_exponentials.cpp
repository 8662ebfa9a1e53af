// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_exponentials.h"

#include "cuda/linear_glue.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor> linear_exponentials_(Tensor exponentials, Tensor hidden, Tensor weight,
                                                MaybeTensor bias, Tensor actions, MaybeTensor mask,
                                                double temperature, double softcap) {
  const char* op = "linear_exponentials_";
  const OnDeviceOf guard(op, "hidden", hidden);
  HeadInputs in(op, hidden, weight, bias, actions, mask, {temperature, softcap});
  check_matrix(op, "exponentials", exponentials, hidden);
  KLQ_CHECK(op, exponentials.size(0) == in.args.rows && exponentials.size(1) == in.args.columns,
            "exponentials must be [rows of hidden, rows of weight]");
  in.args.logits = exponentials.data_ptr();
  in.args.logits_type = in.args.type, in.args.logits_stride = exponentials.stride(0);
  in.allot(hidden, linear_exponentials_scratch(in.args.rows, in.args.columns));
  Tensor logprobs = new_vector(hidden, in.args.rows), factors = new_vector(hidden, in.args.rows);
  STD_CUDA_CHECK(linear_exponentials(in.args, in.actions.data, floats(logprobs), floats(factors),
                                     current_stream(hidden)));
  return {logprobs, factors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("linear_exponentials_", TORCH_BOX(&linear_exponentials_));
}

}  // namespace klq::cuda
