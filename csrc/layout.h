// SPDX-License-Identifier: Apache-2.0
// How the rows [..., V] of a tensor lie in memory, for kernels that read them where they are.
#pragma once
#include "check.h"

namespace klq {

struct RowLayout {
  // row i starts outer_stride * (i / inner) + inner_stride * (i % inner) elements after the first
  int64_t count = 0, width = 0, inner = 1, inner_stride = 0, outer_stride = 0;
};

// Unit stride over V, and leading dimensions that collapse to two.
inline RowLayout row_layout(const char* op, const torch::stable::Tensor& x) {
  const int64_t dims = x.dim();
  KLQ_CHECK(op, dims >= 1 && x.size(dims - 1) >= 1, "expected [..., V] with V >= 1");
  RowLayout r;
  r.width = x.size(dims - 1);
  r.count = x.numel() / r.width;
  if (r.count == 0) return r;
  KLQ_CHECK(op, r.width == 1 || x.stride(dims - 1) == 1, "the vocabulary must have unit stride");
  int groups = 0;
  int64_t next = 0;
  for (int64_t d = dims - 2; d >= 0; --d) {
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 1) continue;
    if (groups == 0 || stride != next) {
      ++groups;
      KLQ_CHECK(op, groups <= 2, "the leading dimensions must collapse to two strides");
      (groups == 1 ? r.inner_stride : r.outer_stride) = stride;
    }
    if (groups == 1) r.inner *= size;
    next = stride * size;
  }
  return r;
}

}  // namespace klq
