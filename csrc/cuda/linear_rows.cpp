// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_rows.h"

#include "cuda/linear_glue.h"

namespace klq::cuda {
namespace {

// The arguments both operators have; keeps converted ones alive.
struct Checked {
  Input bias;
  Array<int64_t> actions;
  Head head{};

  Checked(const char* op, const Tensor& hidden, const Tensor& weight, const MaybeTensor& b,
          const Tensor& a, double temperature, double softcap, const MaybeTensor& out)
      : bias(op, "bias", b, hidden, weight.size(0)),
        actions(op, "actions", a, ScalarType::Long, hidden, hidden.size(0)) {
    check_matrix(op, "hidden", hidden, hidden);
    check_matrix(op, "weight", weight, hidden);
    const int64_t n = hidden.size(0), v = weight.size(0);
    KLQ_CHECK(op, hidden.size(1) == weight.size(1) && hidden.size(1) % 8 == 0 && v > 0,
              "hidden and weight must be as deep, a multiple of 8, and weight must have rows");
    KLQ_CHECK(op, !b || b->scalar_type() == ScalarType::BFloat16, "bias must be bfloat16");
    if (out) {
      check_matrix(op, "out", *out, hidden);
      KLQ_CHECK(op, out->size(0) == n && out->size(1) == v,
                "out must be [rows of hidden, rows of weight]");
    }
    head.hidden = hidden.data_ptr(), head.weight = weight.data_ptr(), head.bias = bias.data();
    head.rows = n, head.depth = hidden.size(1), head.columns = v;
    head.hidden_stride = hidden.stride(0), head.weight_stride = weight.stride(0);
    head.actions = actions.data, head.scaling = {temperature, softcap};
    head.out = out ? out->data_ptr() : nullptr, head.stride = out ? out->stride(0) : 0;
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_rows_(Tensor hidden, Tensor weight, MaybeTensor bias,
                                                Tensor actions, MaybeTensor mask,
                                                double temperature, double softcap, bool entropy,
                                                MaybeTensor out) {
  const char* op = "linear_rows_";
  const OnDeviceOf guard(op, "hidden", hidden);
  const Checked checked(op, hidden, weight, bias, actions, temperature, softcap, out);
  KLQ_CHECK(op, !entropy || !out, "entropy and out exclude each other");
  const int64_t n = checked.head.rows;
  const Array<bool> use(op, "mask", mask, ScalarType::Bool, hidden, n);
  Tensor scratch = new_vector(hidden, linear_rows_scratch(n, checked.head.columns, entropy));
  Tensor logprobs = new_vector(hidden, n), row_stats = new_floats(hidden, {{3, n}});
  Tensor moments = new_vector(hidden, entropy ? n : 0);
  const LinearRows args{checked.head,
                        use.data,
                        floats(scratch),
                        floats(logprobs),
                        entropy ? floats(moments) : nullptr,
                        floats(row_stats)};
  STD_CUDA_CHECK(linear_rows(args, current_stream(hidden)));
  return {logprobs, row_stats, moments};
}

void linear_dlogits_(Tensor out, Tensor hidden, Tensor weight, MaybeTensor bias, Tensor actions,
                     Tensor scale, Tensor own, Tensor reference, double temperature,
                     double softcap) {
  const char* op = "linear_dlogits_";
  const OnDeviceOf guard(op, "hidden", hidden);
  const Checked checked(op, hidden, weight, bias, actions, temperature, softcap, out);
  const int64_t n = checked.head.rows;
  const Array<float> by(op, "scale", scale, ScalarType::Float, hidden, n);
  const Array<float> owns(op, "own", own, ScalarType::Float, hidden, n);
  const Array<float> from(op, "reference", reference, ScalarType::Float, hidden, n);
  const LinearDlogits args{checked.head, by.data, owns.data, from.data};
  STD_CUDA_CHECK(linear_dlogits(args, current_stream(hidden)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("linear_rows_", TORCH_BOX(&linear_rows_));
  m.impl("linear_dlogits_", TORCH_BOX(&linear_dlogits_));
}

}  // namespace klq::cuda
