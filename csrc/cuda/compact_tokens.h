// SPDX-License-Identifier: Apache-2.0
// Torch-free launcher: where the active tokens are, in order, without a synchronisation.
#pragma once
#include "cuda/rows.h"

namespace klq::cuda {

// Of the first `size` active tokens: their positions in index and source, true in use. Slots that
// are left over: `tokens` in index, tokens - 1 in source, false. bad: NaN where there were more
// active tokens, else 0.
struct CompactArgs {
  const bool* mask;  // [tokens]
  int64_t tokens, size;
  int64_t *index, *source;  // [size]
  bool* use;                // [size]
  float* bad;               // [1]
};
cudaError_t compact_tokens(const CompactArgs& args, cudaStream_t stream);

}  // namespace klq::cuda
