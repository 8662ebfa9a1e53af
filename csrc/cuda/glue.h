// SPDX-License-Identifier: Apache-2.0
// From stable-ABI tensors to what the torch-free launchers take: device guard, current stream, new
// tensors. Errors are thrown here, never from nvcc-compiled code.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "check.h"

namespace klq::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The device of `x` is current while it lives. An op of several tensors comes here when any of them
// is on a CUDA device, so this one may not be.
struct OnDeviceOf {
  OnDeviceOf(const char* op, const char* name, const Tensor& x) {
    KLQ_CHECK(op, x.is_cuda(), name, " must be on a CUDA device");
    int current = -1;
    STD_CUDA_CHECK(cudaGetDevice(&current));
    // nearly always it is current already, and a guard is an allocation and two more questions
    if (current != x.get_device_index()) guard_.emplace(x.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A small input where it lies, or a contiguous copy; null when absent. Keeps its tensor alive.
struct Input {
  MaybeTensor tensor;

  Input(const char* op, const char* name, const MaybeTensor& x, const Tensor& like, int64_t count)
      : tensor(x) {
    if (!x) return;
    KLQ_CHECK(op, x->is_cuda() && x->get_device_index() == like.get_device_index(), name,
              " must be on the device of the other inputs");
    KLQ_CHECK(op, count < 0 || x->numel() == count, name, " has ", x->numel(),
              " elements, expected ", count);
    if (!x->is_contiguous()) tensor = torch::stable::contiguous(*x);
  }
  const void* data() const { return tensor ? tensor->data_ptr() : nullptr; }
  // whether `n` bytes at a time may be read
  bool aligned(uintptr_t n) const { return reinterpret_cast<uintptr_t>(data()) % n == 0; }
};

// Uninitialised memory. Straight to the shim: a boxed call through the dispatcher costs several
// times as much, and a small op makes three of these.
inline Tensor new_on_device(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            int32_t dtype) {
  constexpr size_t kMost = 64;
  KLQ_CHECK("cuda", sizes.size() <= kMost, "more than ", kMost, " dimensions");
  int64_t strides[kMost], next = 1;
  for (size_t d = sizes.size(); d-- > 0; next *= std::max<int64_t>(1, sizes[d])) strides[d] = next;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides,
                                                  dtype, aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &made));
  return Tensor(made);
}
inline Tensor new_floats(const Tensor& like) {
  return new_on_device(like, like.sizes(), aoti_torch_dtype_float32());
}

inline float* floats(Tensor& x) { return static_cast<float*>(x.data_ptr()); }

}  // namespace klq::cuda
