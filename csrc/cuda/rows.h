// SPDX-License-Identifier: Apache-2.0
// Rows of logits on the device, as the torch-free launchers take them.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/types.h"

namespace klq::cuda {

// count rows of width elements; row i starts outer_stride * (i / inner) + inner_stride * (i %
// inner) elements after data; all offsets are 64-bit. count < 2^31, checked by the glue.
struct Rows {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t count = 0, width = 0, inner = 1, inner_stride = 0, outer_stride = 0;
};

// The rows a mask leaves: list holds active ones first and inactive ones from its end.
struct ActiveRows {
  const int32_t* list = nullptr;    // null: every row is active
  const int32_t* active = nullptr;  // their number
};

struct Scaling {
  double temperature, softcap;  // softcap 0: none
};

// What a pass over rows leaves behind, one float a row; null: not wanted.
struct RowOutputs {
  const int64_t* actions;
  float* logprobs;
  float* row_stats;  // [3, count]: max, sum of the other tokens' exponentials, chosen logit; scaled
  float* entropy;
  float *ref_logprobs, *kl, *log_ratios;  // need the reference's rows
};

// One read of every active row (and of the reference's, unless ref is null).
cudaError_t sum_rows(const Rows& rows, const ActiveRows& active, Scaling scaling,
                     const RowOutputs& out, cudaStream_t stream);
cudaError_t sum_row_pairs(const Rows& rows, const Rows& ref, const ActiveRows& active,
                          Scaling scaling, const RowOutputs& out, cudaStream_t stream);

// The rows that are active: by a mask, and before the last of cu_seqlens; null: all.
struct Activity {
  const bool* mask = nullptr;
  const void* last = nullptr;
  bool wide_last = false;  // int64, not int32

  explicit operator bool() const { return mask || last; }
};
// Their list, in scratch memory of count + 2 integers.
cudaError_t list_rows(const Activity& activity, int64_t count, int32_t* scratch, ActiveRows* out,
                      cudaStream_t stream);

}  // namespace klq::cuda
