// SPDX-License-Identifier: Apache-2.0
#include "cuda/sequences.h"

namespace klq::cuda {
namespace {

Tensor place_scores(Tensor scores, Tensor mask, MaybeTensor cu_seqlens) {
  const char* op = "place_scores";
  const OnDeviceOf guard(op, "mask", mask);
  const SequencesInput seqs(op, mask, cu_seqlens);
  const RealInput score(op, "scores", scores, mask, seqs.per_sequence());
  const MaskInput use(op, mask, mask, seqs.seqs.tokens);
  Tensor rewards = new_floats(mask);
  STD_CUDA_CHECK(launch_place_scores(seqs.seqs, score.reals, use.bytes(), floats(rewards),
                                     current_stream(mask)));
  return rewards;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("place_scores", TORCH_BOX(&place_scores)); }

}  // namespace klq::cuda
