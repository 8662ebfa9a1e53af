// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_hidden.h"

#include "cuda/linear_glue.h"

namespace klq::cuda {
namespace {

void linear_hidden_(Tensor out, Tensor dlogits, Tensor weight, MaybeTensor scale) {
  const char* op = "linear_hidden_";
  const OnDeviceOf guard(op, "dlogits", dlogits);
  check_matrix(op, "dlogits", dlogits, dlogits);
  check_matrix(op, "weight", weight, dlogits);
  check_matrix(op, "out", out, dlogits);
  const int64_t n = dlogits.size(0);
  KLQ_CHECK(op,
            dlogits.size(1) == weight.size(0) && out.size(0) == n &&
                out.size(1) == weight.size(1) && out.size(1) % 8 == 0,
            "out must be [rows of dlogits, columns of weight], a multiple of 8 of them");
  KLQ_CHECK(op, weight.size(0) > 0, "weight must have rows");
  const Array<float> factors(op, "scale", scale, ScalarType::Float, dlogits, n);
  HiddenArgs args{};
  args.dlogits = dlogits.data_ptr(), args.weight = weight.data_ptr(), args.scale = factors.data;
  args.rows = n, args.columns = weight.size(0), args.depth = out.size(1);
  args.dlogits_stride = dlogits.stride(0), args.weight_stride = weight.stride(0);
  args.stride = out.stride(0), args.out = out.data_ptr();
  STD_CUDA_CHECK(linear_hidden(args, current_stream(dlogits)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("linear_hidden_", TORCH_BOX(&linear_hidden_)); }

}  // namespace klq::cuda
