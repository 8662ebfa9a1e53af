// SPDX-License-Identifier: Apache-2.0
// From stable-ABI tensors to the raw pointers the torch-free numerics take.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/rows.h"
#include "layout.h"

namespace klq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Type type_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    case ScalarType::Double:
      return Type::f64;
    default:
      KLQ_CHECK(op, false, "expected a floating point tensor");
      return Type::f32;
  }
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }
inline bool is_double(const MaybeTensor& x) { return x.has_value() && is_double(*x); }

// Rows [..., V] of a tensor, read where they lie.
inline Rows rows_of(const char* op, const Tensor& x) {
  const RowLayout l = row_layout(op, x);
  Rows r;
  r.data = static_cast<char*>(x.data_ptr());
  r.type = type_of(op, x);
  r.size = x.element_size();
  r.width = l.width, r.count = l.count;
  r.inner = l.inner, r.inner_stride = l.inner_stride, r.outer_stride = l.outer_stride;
  return r;
}

template <class W>
constexpr ScalarType scalar_type = sizeof(W) == 8 ? ScalarType::Double : ScalarType::Float;

inline Tensor contiguous_as(const Tensor& x, ScalarType dtype) {
  Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return y.is_contiguous() ? y : torch::stable::contiguous(y);
}

// A small per-token or per-sequence input as a contiguous array; keeps its tensor alive.
template <class T>
struct Array {
  std::optional<Tensor> tensor;
  const T* data = nullptr;
  explicit operator bool() const { return data != nullptr; }
  T operator[](int64_t i) const { return data[i]; }
};

template <class T>
Array<T> array_as(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                  int64_t count) {
  KLQ_CHECK(op, x.is_cpu(), name, " must be on the CPU like the other inputs");
  KLQ_CHECK(op, count < 0 || x.numel() == count, name, " has ", x.numel(), " elements, expected ",
            count);
  Array<T> a;
  a.tensor = contiguous_as(x, dtype);
  a.data = static_cast<const T*>(a.tensor->data_ptr());
  return a;
}
template <class T>
Array<T> array_as(const char* op, const char* name, const MaybeTensor& x, ScalarType dtype,
                  int64_t count) {
  return x.has_value() ? array_as<T>(op, name, *x, dtype, count) : Array<T>{};
}
template <class W>
Array<W> reals(const char* op, const char* name, const Tensor& x, int64_t count) {
  type_of(op, x);  // integers are refused, not converted
  return array_as<W>(op, name, x, scalar_type<W>, count);
}
template <class W>
Array<W> reals(const char* op, const char* name, const MaybeTensor& x, int64_t count) {
  return x.has_value() ? reals<W>(op, name, *x, count) : Array<W>{};
}
template <class X>
Array<int64_t> ids(const char* op, const char* name, const X& x, int64_t count) {
  return array_as<int64_t>(op, name, x, ScalarType::Long, count);
}
inline Array<bool> mask_of(const char* op, const MaybeTensor& x, int64_t count) {
  KLQ_CHECK(op, !x || x->scalar_type() == ScalarType::Bool, "mask must be bool");
  return array_as<bool>(op, "mask", x, ScalarType::Bool, count);
}

// A new tensor of logits' size. Its pages are asked for in units of 2 MiB: on first touch the
// kernel zeroes and maps every page, and 25 000 faults for 100 MB took 73 ms where the row pass
// takes 13 (2 cores, 2026-11-22).
inline Tensor new_rows(const Tensor& like, std::optional<ScalarType> dtype = std::nullopt) {
  Tensor x = torch::stable::new_empty(like, like.sizes(), dtype);
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge;
  const uintptr_t last = (begin + x.numel() * x.element_size()) / huge * huge;
  // advice only: where it is refused, small pages serve as well
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

template <class T>
T* data(Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// Rows per task so that a task is worth a thread's wake-up, whatever the width.
inline int64_t grain(int64_t width) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width));
}

template <class Body>
void for_rows(const Rows& rows, const Body& body) {
  torch::stable::parallel_for(0, rows.count, grain(rows.width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// body(W{}) with W = double if any input is double, else float.
template <class Body>
auto with_precision(bool use_double, const Body& body) {
  if (use_double) return body(double{});
  return body(float{});
}

}  // namespace klq
