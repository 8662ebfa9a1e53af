// SPDX-License-Identifier: Apache-2.0
// The LM head with a softmax: which tiling, by type.
#include "cuda/linear_stats.cuh"

namespace klq::cuda {
namespace {

using Tile = Tiling<2, 192, true, 5, 2, 1>;

template <class T>
cudaError_t run(const LinearArgs& args, const RowOutputs& out, cudaStream_t stream) {
  if (!args.logits) return linear_stats_as<T, Tile, void>(args, out, stream);
  if (args.logits_type == Type::f32) return linear_stats_as<T, Tile, float>(args, out, stream);
  return linear_stats_as<T, Tile, T>(args, out, stream);
}

}  // namespace

int64_t linear_stats_scratch(int64_t rows, int64_t columns, bool entropy) {
  return TileSums::floats(rows, (columns + Tile::kCols - 1) / Tile::kCols, entropy);
}

cudaError_t linear_stats(const LinearArgs& args, const RowOutputs& out, cudaStream_t stream) {
  return args.type == Type::bf16 ? run<bf16>(args, out, stream) : run<f16>(args, out, stream);
}

}  // namespace klq::cuda
