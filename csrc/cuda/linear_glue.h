// SPDX-License-Identifier: Apache-2.0
// What the operators on our own product ask of their matrices.
#pragma once
#include "cuda/row_glue.h"

namespace klq::cuda {

// x [rows, columns] as the copy engine takes it.
inline void check_matrix(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  KLQ_CHECK(op, x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
            " must be on the device of the others");
  KLQ_CHECK(op, x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16, name,
            " must be a bfloat16 matrix");
  KLQ_CHECK(op, x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.stride(0) >= x.size(1), name,
            " must have unit stride along its rows, which are 16 bytes or multiples apart");
  KLQ_CHECK(op, reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name,
            " must begin at a multiple of 16 bytes");
}

}  // namespace klq::cuda
