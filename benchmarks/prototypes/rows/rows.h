// SPDX-License-Identifier: Apache-2.0
// Rows of logits on the device, as the launchers take them.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace klq::cuda {

enum class Type : uint8_t { f32, bf16, f16 };

// count rows of width elements; row i starts outer_stride * (i / inner) + inner_stride * (i %
// inner) elements after data; all offsets are 64-bit.
struct Rows {
  void* data;
  Type type;
  int64_t count, width, inner, inner_stride, outer_stride;
  // active rows first, inactive ones from the end, and the number of active ones; null: all active
  const int32_t* list = nullptr;
  const int32_t* active = nullptr;
  // set by the launcher
  int max_body = 0, chunks = 0;
};

struct Scaling {
  double temperature, softcap;  // softcap 0: none
};

}  // namespace klq::cuda
