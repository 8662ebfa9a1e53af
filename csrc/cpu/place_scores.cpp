// SPDX-License-Identifier: Apache-2.0
#include "cpu/sequences.h"

namespace klq {
namespace {

Tensor place_scores(Tensor scores, Tensor mask, MaybeTensor cu_seqlens) {
  const char* op = "place_scores";
  const Sequences seqs(op, mask, cu_seqlens);
  const auto use = mask_of(op, mask, seqs.tokens);
  return with_precision(is_double(scores), [&](auto w) {
    using W = decltype(w);
    const auto score = reals<W>(op, "scores", scores, seqs.per_sequence());
    Tensor out = torch::stable::new_zeros(scores, mask.sizes(), scalar_type<W>);
    W* rewards = data<W>(out);
    for (int64_t s = 0; s < seqs.count; ++s) {
      const int64_t begin = seqs.begin(s);
      int64_t i = begin + seqs.size(s) - 1;
      while (i >= begin && !use[i]) --i;
      if (i >= begin) rewards[i] = score[s];
    }
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("place_scores", TORCH_BOX(&place_scores)); }

}  // namespace klq
