// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_weight.h"

#include "cuda/linear_glue.h"

namespace klq::cuda {
namespace {

void check_rows(const char* op, const char* name, const Tensor& x, const Tensor& hidden) {
  KLQ_CHECK(op, x.is_cuda() && x.get_device_index() == hidden.get_device_index(), name,
            " must be on the device of hidden");
  KLQ_CHECK(op, x.dim() == 2 && x.is_contiguous() && x.size(1) == hidden.size(1), name,
            " must be a contiguous matrix as wide as hidden");
  KLQ_CHECK(op, x.size(1) % 8 == 0 && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name,
            " must have rows of whole 16 bytes and begin at a multiple of 16 bytes");
}

void linear_weight_(Tensor out, Tensor dlogits, Tensor hidden, bool add, MaybeTensor slots,
                    MaybeTensor extra) {
  const char* op = "linear_weight_";
  const OnDeviceOf guard(op, "hidden", hidden);
  check_matrix(op, "hidden", hidden, hidden);
  check_matrix(op, "dlogits", dlogits, hidden);
  check_rows(op, "out", out, hidden);
  const bool wide = out.scalar_type() == ScalarType::Float;
  KLQ_CHECK(op, wide || out.scalar_type() == ScalarType::BFloat16,
            "out must be float32 or bfloat16");
  KLQ_CHECK(op, dlogits.size(0) == hidden.size(0) && dlogits.size(1) == out.size(0),
            "dlogits must be [rows of hidden, rows of out]");
  KLQ_CHECK(op, hidden.size(0) > 0, "hidden must have rows");
  KLQ_CHECK(op, !wide || !slots, "slots are for a bfloat16 out");
  KLQ_CHECK(op, wide || !add, "only a float32 out is added to");
  KLQ_CHECK(op, bool(slots) == bool(extra), "slots and extra go together");
  const Array<int32_t> places(op, "slots", slots, ScalarType::Int, hidden, 2 * out.size(0));
  if (extra) {
    check_rows(op, "extra", *extra, hidden);
    KLQ_CHECK(op, extra->scalar_type() == ScalarType::Float, "extra must be float32");
  }
  WeightArgs args{};
  args.dlogits = dlogits.data_ptr(), args.hidden = hidden.data_ptr();
  args.rows = hidden.size(0), args.columns = out.size(0), args.depth = out.size(1);
  args.dlogits_stride = dlogits.stride(0), args.hidden_stride = hidden.stride(0);
  args.type = wide ? Type::f32 : Type::bf16, args.out = out.data_ptr(), args.add = add;
  args.slots = places.data, args.extra = extra ? floats(*extra) : nullptr;
  STD_CUDA_CHECK(linear_weight(args, current_stream(hidden)));
}

void linear_chosen_(MaybeTensor out, Tensor slots, Tensor hidden, Tensor actions, Tensor scale,
                    Tensor own, bool apart, MaybeTensor bias) {
  const char* op = "linear_chosen_";
  const OnDeviceOf guard(op, "hidden", hidden);
  check_matrix(op, "hidden", hidden, hidden);
  KLQ_CHECK(op,
            slots.is_cuda() && slots.get_device_index() == hidden.get_device_index() &&
                slots.dim() == 2 && slots.size(0) == 2 && slots.is_contiguous() &&
                slots.scalar_type() == ScalarType::Int,
            "slots must be [2, vocabulary] in int32, contiguous, on the device of hidden");
  const int64_t n = hidden.size(0), v = slots.size(1);
  if (out) {
    check_rows(op, "out", *out, hidden);
    KLQ_CHECK(op, out->scalar_type() == ScalarType::Float, "out must be float32");
    KLQ_CHECK(op, out->size(0) == (apart ? n : v), "out must be as long as ",
              apart ? "hidden" : "the vocabulary");
  }
  KLQ_CHECK(op,
            !bias || (bias->is_cuda() && bias->is_contiguous() && bias->numel() == v &&
                      bias->scalar_type() == ScalarType::Float),
            "bias must be [vocabulary] in float32, contiguous");
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, hidden, n);
  const Array<float> factors(op, "scale", scale, ScalarType::Float, hidden, n);
  const Array<float> owns(op, "own", own, ScalarType::Float, hidden, n);
  ChosenArgs args{};
  args.hidden = hidden.data_ptr(), args.actions = ids.data;
  args.scale = factors.data, args.own = owns.data;
  args.rows = n, args.columns = v, args.depth = hidden.size(1);
  args.hidden_stride = hidden.stride(0), args.apart = apart;
  args.out = out ? floats(*out) : nullptr, args.bias = bias ? floats(*bias) : nullptr;
  args.slots = static_cast<int32_t*>(slots.data_ptr());
  STD_CUDA_CHECK(linear_chosen(args, current_stream(hidden)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("linear_weight_", TORCH_BOX(&linear_weight_));
  m.impl("linear_chosen_", TORCH_BOX(&linear_chosen_));
}

}  // namespace klq::cuda
