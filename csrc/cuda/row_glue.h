// SPDX-License-Identifier: Apache-2.0
// Rows of logits and their masks, from stable-ABI tensors to what the row launchers take.
#pragma once
#include <vector>

#include "cuda/glue.h"
#include "cuda/rows.h"
#include "layout.h"

namespace klq::cuda {

inline Rows rows_of(const char* op, const Tensor& x) {
  const RowLayout l = row_layout(op, x);
  Rows r;
  r.data = x.data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float:
      r.type = Type::f32;
      break;
    case ScalarType::BFloat16:
      r.type = Type::bf16;
      break;
    case ScalarType::Half:
      r.type = Type::f16;
      break;
    default:
      KLQ_CHECK(op, false, "rows on CUDA are float32, bfloat16 or float16");
  }
  constexpr int64_t limit = (int64_t(1) << 31) - 4096;
  KLQ_CHECK(op, l.count < limit && l.width < limit,
            "needs fewer than 2^31 - 4096 rows and columns");
  r.width = l.width, r.count = l.count;
  r.inner = l.inner, r.inner_stride = l.inner_stride, r.outer_stride = l.outer_stride;
  return r;
}

// The reference's rows, of the shape of `like`.
inline Rows rows_like(const char* op, const Tensor& x, const Tensor& logits, const Rows& like) {
  KLQ_CHECK(op, x.is_cuda() && x.get_device_index() == logits.get_device_index(),
            "both logits must be on the same device");
  const Rows r = rows_of(op, x);
  KLQ_CHECK(op, r.count == like.count && r.width == like.width,
            "both logits must have the same shape");
  return r;
}

// A small input as an array of T: converted where it is of another type.
template <class T>
struct Array : Input {
  const T* data;

  Array(const char* op, const char* name, const MaybeTensor& x, ScalarType dtype,
        const Tensor& like, int64_t count)
      : Input(op, name, x, like, count) {
    if (tensor && tensor->scalar_type() != dtype) tensor = torch::stable::to(*tensor, dtype);
    data = static_cast<const T*>(Input::data());
  }
};

inline Tensor new_floats(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return new_on_device(like, shape, aoti_torch_dtype_float32());
}
inline Tensor new_vector(const Tensor& like, int64_t count) {
  return new_floats(like, {&count, 1});
}
inline Tensor new_like(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_on_device(like, shape, dtype);
}
// [k, *actions.shape]
inline Tensor new_stacked(const Tensor& logits, int64_t k, const Tensor& actions) {
  std::vector<int64_t> shape{k};
  for (int64_t d = 0; d < actions.dim(); ++d) shape.push_back(actions.size(d));
  return new_floats(logits, shape);
}

// [*actions.shape], or [0] where a result is not wanted
inline Tensor new_tokens(const Tensor& logits, const Tensor& actions, bool wanted) {
  return wanted ? new_floats(logits, actions.sizes()) : new_vector(logits, 0);
}

// A mask, and the end of packed sequences, on their way to the kernels; keeps the list's memory
// alive until they are enqueued.
struct Mask {
  Array<bool> bits;
  MaybeTensor scratch;
  ActiveRows rows;

  Mask(const char* op, const MaybeTensor& mask, const Tensor& like, int64_t count,
       cudaStream_t stream, const void* last = nullptr, bool wide_last = false)
      : bits(op, "mask", mask, ScalarType::Bool, like, count) {
    const Activity activity{bits.data, last, wide_last};
    if (!activity) return;
    const int64_t size = count + 2;
    scratch = new_on_device(like, {&size, 1}, aoti_torch_dtype_int32());
    STD_CUDA_CHECK(
        list_rows(activity, count, static_cast<int32_t*>(scratch->data_ptr()), &rows, stream));
  }
};

}  // namespace klq::cuda
