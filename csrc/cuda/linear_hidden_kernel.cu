// SPDX-License-Identifier: Apache-2.0
// dH of the LM head. Tiles of its transpose, as in linear_weight_kernel.cu: 256 of the width by 192
// tokens.
#include "cuda/gemm.cuh"
#include "cuda/linear_hidden.h"

namespace klq::cuda {
namespace {

using Tile = Tiling<2, 192, 5, 2, true, false>;

struct ScaledRows {
  bf16* out;
  const float* scale;  // null: 1
  int64_t stride;
  int rows, depth;  // of out

  template <int N>
  __device__ __forceinline__ void finish(const float (&c)[N], int row, int column, uint32_t,
                                         int lane) const {
    const int pair = 2 * (lane % 4), end = rows - column;
    const float* s = scale + column;
    bf16* to = out + (column + lane / 4) * stride + row + pair;
#pragma unroll
    for (int j = 0; j < N / 4; ++j, to += 8 * stride) {
      const int token = 8 * j + pair;
      float x = 1.0f, y = 1.0f;
      if (scale) x = token < end ? s[token] : 0.0f, y = token + 1 < end ? s[token + 1] : 0.0f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float scaled[2] = {c[4 * j + 2 * h] * x, c[4 * j + 2 * h + 1] * y};
        const uint32_t both = transposed(Vec<bf16>::pack(scaled));
        if (8 * j + lane / 4 < end && row + 8 * h < depth)
          *reinterpret_cast<uint32_t*>(to + 8 * h) = both;
      }
    }
  }
};

}  // namespace

cudaError_t linear_hidden(const HiddenArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.depth == 0) return cudaSuccess;
  const Matrix a{args.weight, Type::bf16, args.columns, args.depth, args.weight_stride};
  const Matrix b{args.dlogits, Type::bf16, args.rows, args.columns, args.dlogits_stride};
  const ScaledRows rows{static_cast<bf16*>(args.out), args.scale, args.stride, int(args.rows),
                        int(args.depth)};
  return launch_gemm<Tile>(a, b, rows, stream);
}

}  // namespace klq::cuda
