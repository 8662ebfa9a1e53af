// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_rows.h"

#include "cuda/linear_glue.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_rows_(Tensor hidden, Tensor weight,
                                                        MaybeTensor bias, Tensor actions,
                                                        MaybeTensor mask, double temperature,
                                                        double softcap, bool entropy,
                                                        MaybeTensor exponentials) {
  const char* op = "linear_rows_";
  const OnDeviceOf guard(op, "hidden", hidden);
  check_matrix(op, "hidden", hidden, hidden);
  check_matrix(op, "weight", weight, hidden);
  const int64_t n = hidden.size(0), v = weight.size(0);
  KLQ_CHECK(op, hidden.size(1) == weight.size(1) && hidden.size(1) % 8 == 0 && v > 0,
            "hidden and weight must be as deep, a multiple of 8, and weight must have rows");
  const Input added(op, "bias", bias, hidden, v);
  KLQ_CHECK(op, !bias || bias->scalar_type() == ScalarType::BFloat16, "bias must be bfloat16");
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, hidden, n);
  const Array<bool> use(op, "mask", mask, ScalarType::Bool, hidden, n);
  if (exponentials) {
    check_matrix(op, "exponentials", *exponentials, hidden);
    KLQ_CHECK(op, exponentials->size(0) == n && exponentials->size(1) == v,
              "exponentials must be [rows of hidden, rows of weight]");
    KLQ_CHECK(op, !entropy, "entropy and exponentials exclude each other");
  }
  Tensor scratch = new_vector(hidden, linear_rows_scratch(n, v, entropy));
  Tensor logprobs = new_vector(hidden, n), factors = new_vector(hidden, n);
  Tensor moments = new_vector(hidden, entropy ? n : 0);
  Tensor own = new_vector(hidden, exponentials ? n : 0);
  LinearArgs args{};
  args.hidden = hidden.data_ptr(), args.weight = weight.data_ptr(), args.bias = added.data();
  args.rows = n, args.depth = hidden.size(1), args.columns = v;
  args.hidden_stride = hidden.stride(0), args.weight_stride = weight.stride(0);
  args.actions = ids.data, args.mask = use.data, args.scaling = {temperature, softcap};
  args.exponentials = exponentials ? exponentials->data_ptr() : nullptr;
  args.stride = exponentials ? exponentials->stride(0) : 0;
  args.scratch = floats(scratch), args.logprobs = floats(logprobs);
  args.factors = floats(factors), args.entropy = entropy ? floats(moments) : nullptr;
  args.own = floats(own);
  STD_CUDA_CHECK(linear_rows(args, current_stream(hidden)));
  return {logprobs, factors, moments, own};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("linear_rows_", TORCH_BOX(&linear_rows_)); }

}  // namespace klq::cuda
