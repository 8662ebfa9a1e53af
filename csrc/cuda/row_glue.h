// SPDX-License-Identifier: Apache-2.0
// Rows of logits and their masks, from stable-ABI tensors to what the row launchers take.
#pragma once
#include "cuda/glue.h"
#include "cuda/rows.h"
#include "layout.h"

namespace klq::cuda {

using torch::stable::new_empty;

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
  constexpr int64_t limit = (int64_t(1) << 31) - 64;
  KLQ_CHECK(op, l.count < limit && l.width < limit, "needs fewer than 2^31 rows and columns");
  r.width = l.width, r.count = l.count;
  r.inner = l.inner, r.inner_stride = l.inner_stride, r.outer_stride = l.outer_stride;
  return r;
}

// The reference's rows, of the shape of `like`.
inline Rows rows_like(const char* op, const Tensor& x, const Rows& like) {
  const Rows r = rows_of(op, x);
  KLQ_CHECK(op, r.count == like.count && r.width == like.width,
            "both logits must have the same shape");
  return r;
}

inline Tensor new_floats(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  return new_empty(like, shape, ScalarType::Float);
}
inline Tensor new_vector(const Tensor& like, int64_t count, ScalarType dtype = ScalarType::Float) {
  const int64_t shape[1] = {count};
  return new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape, 1), dtype);
}
// [k, *actions.shape]
inline Tensor new_stacked(const Tensor& logits, int64_t k, const Tensor& actions) {
  std::vector<int64_t> shape{k};
  for (int64_t d = 0; d < actions.dim(); ++d) shape.push_back(actions.size(d));
  return new_floats(logits, shape);
}

// A mask on its way to the kernels; keeps the list's memory alive until they are enqueued.
struct Mask {
  Array<bool> bits;
  MaybeTensor scratch;
  ActiveRows rows;

  Mask(const char* op, const MaybeTensor& mask, const Tensor& like, int64_t count,
       cudaStream_t stream)
      : bits(op, "mask", mask, ScalarType::Bool, like, count) {
    if (!bits.data) return;
    scratch = new_vector(like, count + 2, ScalarType::Int);
    STD_CUDA_CHECK(
        list_rows(bits.data, count, static_cast<int32_t*>(scratch->data_ptr()), &rows, stream));
  }
};

}  // namespace klq::cuda
