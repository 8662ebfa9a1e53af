// SPDX-License-Identifier: Apache-2.0
// The shapes a scan asks for. Python calls it with arguments nobody has looked at, so that equal
// counts of elements are not enough here.
#pragma once
#include <optional>

#include "check.h"

namespace klq {

struct ScanShapes {
  using Tensor = torch::stable::Tensor;
  using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

  const char* op;
  Sizes tokens, sequences;  // of what has a value a token, and of what has one a sequence
  int64_t count = 0;        // of packed sequences

  ScanShapes(const char* op, const Tensor& values, const std::optional<Tensor>& cu_seqlens)
      : op(op), tokens(values.sizes()) {
    KLQ_CHECK(op, tokens.size() >= 1, "expected [..., T]");
    sequences = {tokens.data(), tokens.size() - 1};
    if (!cu_seqlens) return;
    KLQ_CHECK(op, tokens.size() == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1,
              "cu_seqlens is [S + 1] and goes with packed [N] inputs");
    count = cu_seqlens->size(0) - 1;
    sequences = {&count, 1};
  }
  ScanShapes(const ScanShapes&) = delete;  // `sequences` points into it

  void token(const char* name, const Tensor& x) const { check(name, x, tokens); }
  void token(const char* name, const std::optional<Tensor>& x) const {
    if (x) check(name, *x, tokens);
  }
  void sequence(const char* name, const std::optional<Tensor>& x) const {
    if (x) check(name, *x, sequences);
  }

 private:
  void check(const char* name, const Tensor& x, Sizes wanted) const {
    KLQ_CHECK(op, x.sizes().equals(wanted), name, " has another shape than the other inputs");
  }
};

}  // namespace klq
