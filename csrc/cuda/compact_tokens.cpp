// SPDX-License-Identifier: Apache-2.0
#include "cuda/compact_tokens.h"

#include "cuda/row_glue.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> compact_tokens_(Tensor mask, int64_t size) {
  const char* op = "compact_tokens";
  const OnDeviceOf guard(op, "mask", mask);
  KLQ_CHECK(op, mask.dim() == 1 && mask.numel() > 0 && size >= 0,
            "mask must be a vector that is not empty, and the size not negative");
  const Array<bool> bits(op, "mask", mask, ScalarType::Bool, mask, mask.numel());
  auto vector = [&](int32_t dtype) { return new_on_device(mask, {&size, 1}, dtype); };
  Tensor index = vector(aoti_torch_dtype_int64()), source = vector(aoti_torch_dtype_int64());
  Tensor use = vector(aoti_torch_dtype_bool()), bad = new_floats(mask, {});
  const CompactArgs args{bits.data,
                         mask.numel(),
                         size,
                         static_cast<int64_t*>(index.data_ptr()),
                         static_cast<int64_t*>(source.data_ptr()),
                         static_cast<bool*>(use.data_ptr()),
                         floats(bad)};
  STD_CUDA_CHECK(compact_tokens(args, current_stream(mask)));
  return {index, source, use, bad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("compact_tokens", TORCH_BOX(&compact_tokens_)); }

}  // namespace klq::cuda
