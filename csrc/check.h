// SPDX-License-Identifier: Apache-2.0
// Checks with the op's name in the message. The Python functions explain bad arguments to people;
// these guard the operators against being called around them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#define KLQ_CHECK(op, condition, ...) STD_TORCH_CHECK(condition, "klq::", op, ": ", __VA_ARGS__)
