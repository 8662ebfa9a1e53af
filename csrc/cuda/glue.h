// SPDX-License-Identifier: Apache-2.0
// From stable-ABI tensors to what the torch-free launchers take: device guard, current stream,
// small inputs as contiguous arrays. Errors are thrown here, never from nvcc-compiled code.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "check.h"

namespace klq::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// An input as a contiguous device array; null when absent. Keeps its tensor alive.
template <class T>
struct Array {
  MaybeTensor tensor;
  const T* data = nullptr;

  Array(const char* op, const char* name, const MaybeTensor& x, ScalarType dtype,
        const Tensor& like, int64_t count) {
    if (!x) return;
    KLQ_CHECK(op, x->is_cuda() && x->get_device_index() == like.get_device_index(), name,
              " must be on the device of the other inputs");
    KLQ_CHECK(op, count < 0 || x->numel() == count, name, " has ", x->numel(),
              " elements, expected ", count);
    Tensor y = x->scalar_type() == dtype ? *x : torch::stable::to(*x, dtype);
    tensor = y.is_contiguous() ? y : torch::stable::contiguous(y);
    data = static_cast<const T*>(tensor->data_ptr());
  }
};

inline float* floats(Tensor& x) { return static_cast<float*>(x.data_ptr()); }

}  // namespace klq::cuda
