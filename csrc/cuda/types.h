// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace klq::cuda {

// Of what a device array holds; arithmetic is float or wider.
enum class Type : uint8_t { f32, bf16, f16 };

}  // namespace klq::cuda
