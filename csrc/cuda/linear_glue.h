// SPDX-License-Identifier: Apache-2.0
// The LM head's operands, from stable-ABI tensors to what the Hopper launchers take.
#pragma once
#include "cuda/linear_stats.h"
#include "cuda/row_glue.h"

namespace klq::cuda {

// x [rows, columns] as the copy engine takes it.
inline void check_matrix(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  KLQ_CHECK(op, x.is_cuda() && x.get_device_index() == like.get_device_index(), name,
            " must be on the device of hidden");
  KLQ_CHECK(op, x.dim() == 2 && x.scalar_type() == like.scalar_type(), name,
            " must be a matrix of hidden's type");
  KLQ_CHECK(op, x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.stride(0) >= x.size(1), name,
            " must have unit stride along its rows, which are 16 bytes or multiples apart");
  KLQ_CHECK(op, reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name,
            " must begin at a multiple of 16 bytes");
}

// The arguments of a launch and what they point to, until it is enqueued.
struct HeadInputs {
  Input bias;
  Array<int64_t> actions;
  Array<bool> mask;
  Tensor scratch;
  LinearArgs args{};

  HeadInputs(const char* op, const Tensor& hidden, const Tensor& weight, const MaybeTensor& bias_,
             const Tensor& actions_, const MaybeTensor& mask_, Scaling scaling)
      : bias(op, "bias", bias_, hidden, weight.size(0)),
        actions(op, "actions", actions_, ScalarType::Long, hidden, hidden.size(0)),
        mask(op, "mask", mask_, ScalarType::Bool, hidden, hidden.size(0)) {
    KLQ_CHECK(op, hidden.scalar_type() == ScalarType::BFloat16, "the head must be bfloat16");
    args.type = Type::bf16;
    check_matrix(op, "hidden", hidden, hidden);
    check_matrix(op, "weight", weight, hidden);
    KLQ_CHECK(op, hidden.size(1) == weight.size(1) && hidden.size(1) % 8 == 0,
              "hidden and weight must be as deep, a multiple of 8");
    KLQ_CHECK(op, weight.size(0) > 0, "weight must have rows");
    KLQ_CHECK(op, !bias.tensor || bias.tensor->scalar_type() == hidden.scalar_type(),
              "bias must have hidden's type");
    args.hidden = hidden.data_ptr(), args.weight = weight.data_ptr(), args.bias = bias.data();
    args.rows = hidden.size(0), args.depth = hidden.size(1), args.columns = weight.size(0);
    args.hidden_stride = hidden.stride(0), args.weight_stride = weight.stride(0);
    args.mask = mask.data;
    args.scaling = scaling;
  }
  void allot(const Tensor& like, int64_t floats_) {
    scratch = new_vector(like, floats_);
    args.scratch = floats(scratch);
  }
};

}  // namespace klq::cuda
