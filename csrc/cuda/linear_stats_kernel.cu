// SPDX-License-Identifier: Apache-2.0
// The LM head with a softmax: which tiling, by type.
#include "cuda/linear_stats.cuh"

namespace klq::cuda {
namespace {

using Tile = Tiling<2, 192, true, 5, 2, 1>;

}  // namespace

int64_t linear_stats_scratch(int64_t rows, int64_t columns, bool entropy) {
  return TileSums::floats(rows, (columns + Tile::kCols - 1) / Tile::kCols, entropy);
}

cudaError_t linear_row_sums(const LinearArgs& args, const RowOutputs& out, cudaStream_t stream) {
  if (args.type != Type::bf16) return cudaErrorNotSupported;
  return linear_stats_as<bf16, Tile, void>(args, out, stream);
}

}  // namespace klq::cuda
