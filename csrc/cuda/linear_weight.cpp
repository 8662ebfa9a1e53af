// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_weight.h"

#include "cuda/linear_glue.h"

namespace klq::cuda {
namespace {

void check_sum(const char* op, const Tensor& out, const Tensor& hidden) {
  KLQ_CHECK(op, out.is_cuda() && out.get_device_index() == hidden.get_device_index(),
            "out must be on the device of hidden");
  KLQ_CHECK(op, out.dim() == 2 && out.scalar_type() == ScalarType::Float && out.is_contiguous(),
            "out must be a contiguous float32 matrix");
  KLQ_CHECK(op, out.size(1) == hidden.size(1) && hidden.size(1) % 8 == 0,
            "out and hidden must be as wide, a multiple of 8");
}

void linear_weight_(Tensor out, Tensor dlogits, Tensor hidden, bool add) {
  const char* op = "linear_weight_";
  const OnDeviceOf guard(op, "hidden", hidden);
  check_matrix(op, "hidden", hidden, hidden);
  check_matrix(op, "dlogits", dlogits, hidden);
  check_sum(op, out, hidden);
  KLQ_CHECK(op, dlogits.size(0) == hidden.size(0) && dlogits.size(1) == out.size(0),
            "dlogits must be [rows of hidden, rows of out]");
  WeightArgs args{};
  args.dlogits = dlogits.data_ptr(), args.hidden = hidden.data_ptr();
  args.rows = hidden.size(0), args.columns = out.size(0), args.depth = out.size(1);
  args.dlogits_stride = dlogits.stride(0), args.hidden_stride = hidden.stride(0);
  args.stride = out.size(1), args.out = floats(out), args.add = add;
  STD_CUDA_CHECK(linear_weight(args, current_stream(hidden)));
}

void linear_chosen_(Tensor out, Tensor hidden, Tensor order, Tensor actions, Tensor scale,
                    Tensor own) {
  const char* op = "linear_chosen_";
  const OnDeviceOf guard(op, "hidden", hidden);
  check_matrix(op, "hidden", hidden, hidden);
  check_sum(op, out, hidden);
  const int64_t n = hidden.size(0);
  const Array<int64_t> rows(op, "order", order, ScalarType::Long, hidden, n);
  const Array<int32_t> ids(op, "actions", actions, ScalarType::Int, hidden, n);
  const Array<float> factors(op, "scale", scale, ScalarType::Float, hidden, n);
  const Array<float> owns(op, "own", own, ScalarType::Float, hidden, n);
  ChosenArgs args{};
  args.hidden = hidden.data_ptr(), args.order = rows.data, args.actions = ids.data;
  args.scale = factors.data, args.own = owns.data;
  args.rows = n, args.depth = out.size(1);
  args.hidden_stride = hidden.stride(0), args.stride = out.size(1), args.out = floats(out);
  STD_CUDA_CHECK(linear_chosen(args, current_stream(hidden)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("linear_weight_", TORCH_BOX(&linear_weight_));
  m.impl("linear_chosen_", TORCH_BOX(&linear_chosen_));
}

}  // namespace klq::cuda
