// SPDX-License-Identifier: Apache-2.0
// The LM head's gradients: which tiling.
#include "cuda/linear_gradients.h"
#include "cuda/store_tiles.cuh"

namespace klq::cuda {
namespace {

using HiddenTile = Tiling<1, 256, false, 4, 2, 1, 2, false, true>;
using WeightTile = Tiling<1, 256, false, 4, 2, 1, 2, true, true>;

Matrix dlogits_of(const LinearGradientArgs& args) {
  return {args.dlogits, args.type, args.rows, args.columns, args.dlogits_stride};
}

}  // namespace

cudaError_t hidden_gradient(const LinearGradientArgs& args, const void* weight,
                            int64_t weight_stride, void* out, int64_t out_stride,
                            cudaStream_t stream) {
  const Matrix b{weight, args.type, args.columns, args.depth, weight_stride};
  const Matrix to{out, args.type, args.rows, args.depth, out_stride};
  auto run = args.type == Type::bf16 ? store_product<bf16, HiddenTile, bf16, false>
                                     : store_product<f16, HiddenTile, f16, false>;
  return run(dlogits_of(args), b, to, stream, {}, Keep::normal);
}

cudaError_t weight_gradient(const LinearGradientArgs& args, const void* hidden,
                            int64_t hidden_stride, float* out, int64_t out_stride, bool add,
                            cudaStream_t stream) {
  const Matrix b{hidden, args.type, args.rows, args.depth, hidden_stride};
  const Matrix to{out, Type::f32, args.columns, args.depth, out_stride};
  const bool brain = args.type == Type::bf16;
  auto run = add     ? brain ? store_product<bf16, WeightTile, float, true>
                             : store_product<f16, WeightTile, float, true>
             : brain ? store_product<bf16, WeightTile, float, false>
                     : store_product<f16, WeightTile, float, false>;
  return run(dlogits_of(args), b, to, stream, {}, Keep::first_out);
}

}  // namespace klq::cuda
