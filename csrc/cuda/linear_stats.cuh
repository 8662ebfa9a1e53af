// SPDX-License-Identifier: Apache-2.0
// The epilogue that sums up rows of logits while they are in registers: a pair (max, sum) for every
// row and tile, the chosen token's term left out, and a small kernel that merges a row's pairs in a
// fixed order.
#pragma once
#include "cuda/linear_stats.h"
#include "cuda/store_tiles.cuh"
#include "cuda/sum_rows.cuh"

namespace klq::cuda {

// What the tiles leave behind; tile-major, so that rows are next to each other.
struct TileSums {
  float2* pairs;  // [tiles, rows]: max, and sum of 2^exponent without the chosen token
  float* plain;   // [tiles, rows]: sum of 2^exponent times the exponent; null: not wanted
  float* chosen;  // [rows]: y of the action; written only where it is one of the columns

  static int64_t floats(int64_t rows, int64_t tiles, bool entropy) {
    return rows * (tiles * (2 + entropy) + 1);
  }
  TileSums() = default;
  TileSums(float* scratch, int64_t rows, int64_t tiles, bool entropy)
      : pairs(reinterpret_cast<float2*>(scratch)),
        plain(entropy ? scratch + 2 * rows * tiles : nullptr),
        chosen(scratch + rows * tiles * (2 + entropy)) {}
};

// f(element, half, column) for all elements of a fragment: half 0 is row lane / 4, half 1 eight
// further down, and columns count from the thread's first
template <int N, class F>
__device__ __forceinline__ void each(float (&c)[N], F f) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(c[4 * j + 2 * h + i], h, 8 * j + i);
}

// `column` is the thread's first
template <class T, int N>
__device__ __forceinline__ void add_bias(float (&c)[N], const T* bias, int column, int columns) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = column + 8 * j + i;
      const float b = at < columns ? Vec<T>::get(bias + at) : 0.0f;
      c[4 * j + i] += b, c[4 * j + 2 + i] += b;
    }
}

__device__ __forceinline__ float over_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float top_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Out: what logits are stored as; void: they are not.
template <class T, class Out>
struct SumTiles {
  static constexpr bool kStores = !std::is_void_v<Out>;

  RowsOut<std::conditional_t<kStores, Out, T>> logits;
  TileSums to;
  const T* bias;
  const int64_t* actions;
  int rows, columns;
  Scale scale;

  template <class Tile, int N>
  __device__ __forceinline__ void finish(float (&c)[N], int row, int column, uint32_t staging,
                                         int lane) const {
    if (row >= rows || column >= columns) return;
    constexpr int kColumns = 2 * N;
    const int quad = lane % 4, first = row + lane / 4;
    int64_t known[2];  // asked for now, needed later
#pragma unroll
    for (int h = 0; h < 2; ++h) known[h] = first + 8 * h < rows ? actions[first + 8 * h] : -1;
    if (bias) add_bias(c, bias, column + 2 * quad, columns);
    if constexpr (kStores) logits.template put<Tile::kStaging>(c, row, column, staging, lane);
    if (scale.softcap > 0.0f) each(c, [&](float& y, int, int) { y = capped<true>(y, scale); });
    if (column + kColumns > columns) {
      const int end = columns - column - 2 * quad;
      each(c, [&](float& y, int, int at) { y = at < end ? y : -infinity(); });
    }
    float tops[2][2], top[2], point[2];
    for (auto& x : tops) x[0] = x[1] = -infinity();
    each(c, [&](float& y, int h, int at) { tops[h][at % 2] = fmaxf(tops[h][at % 2], y); });
    int action[2];  // counts from the thread's first column, as in `each`
    bool here = false, far = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = top_of_quad(fmaxf(tops[h][0], tops[h][1]));
      const int64_t a = known[h] - column;
      const bool mine = a >= 0 && a < kColumns && known[h] < columns && a % 8 / 2 == quad;
      action[h] = mine ? int(a) - 2 * quad : -1;
      here |= mine;
      point[h] = scale.point(top[h]);
      far |= scale.huge(top[h]);
    }
    if (__any_sync(~0u, here)) {  // rare: one of a row's tiles
      float chosen[2] = {};
      each(c, [&](float& y, int h, int at) {
        chosen[h] = at == action[h] ? y : chosen[h];
        y = at == action[h] ? -infinity() : y;
      });
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (action[h] >= 0) to.chosen[first + 8 * h] = chosen[h];
    }
    if (__any_sync(~0u, far)) {  // rare: Scale::exponent takes differences
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (scale.huge(top[h])) point[h] = 0.0f;
      each(c, [&](float& y, int h, int) { y = scale.huge(top[h]) ? y - top[h] : y; });
    }
    float sums[2][2] = {}, plains[2] = {};
    if (to.plain) {
      each(c, [&](float& y, int h, int at) {
        const float t = fmaf(y, scale.factor, -point[h]), e = exp2_fast(t);
        sums[h][at % 2] += e;
        plains[h] = fmaf(e, fmaxf(t, -16384.0f), plains[h]);  // not 0 * -inf
      });
    } else {
      each(c, [&](float& y, int h, int at) {
        sums[h][at % 2] += exp2_fast(fmaf(y, scale.factor, -point[h]));
      });
    }
    float sum[2], plain[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] = over_quad(sums[h][0] + sums[h][1]);
      plain[h] = to.plain ? over_quad(plains[h]) : 0.0f;
    }
    const int r = first + 8 * quad;  // two of the four lanes write a row each
    if (quad >= 2 || r >= rows) return;
    const int64_t at = int64_t(column / kColumns) * rows + r;
    to.pairs[at] = quad ? make_float2(top[1], sum[1]) : make_float2(top[0], sum[0]);
    if (to.plain) to.plain[at] = quad ? plain[1] : plain[0];
  }
};

constexpr int kMergeWarps = 8;

template <bool MOMENTS>
__global__ void __launch_bounds__(32 * kMergeWarps)
    merge_tiles_kernel(const TileSums from, int tiles, int rows, int columns, const bool* mask,
                       const Scale scale, const RowOutputs out) {
  using Op = SumRows<false, MOMENTS>;
  using S = Sums<false, MOMENTS>;
  constexpr int kAtOnce = 8;  // loads under way
  const Op op{out, rows};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = int(blockIdx.x) * 32 + lane;
  const bool active = row < rows && (!mask || mask[row]);
  S sums;
  for (int t = warp; active && t < tiles; t += kMergeWarps * kAtOnce) {
    S part[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int tile = t + k * kMergeWarps;
      if (tile >= tiles) continue;
      const int64_t at = int64_t(tile) * rows + row;
      const float2 pair = from.pairs[at];
      part[k].max = pair.x, part[k].sum = pair.y;
      if (MOMENTS) part[k].plain = from.plain[at];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sums.merge(part[k], scale);
  }
  __shared__ float kept[kMergeWarps][S::kFloats][32];
  float x[S::kFloats];
  sums.store(x);
  for (int k = 0; k < S::kFloats; ++k) kept[warp][k][lane] = x[k];
  __syncthreads();
  if (warp > 0 || row >= rows) return;
  if (!active) return op.inactive(row);
  for (int w = 1; w < kMergeWarps; ++w) {
    for (int k = 0; k < S::kFloats; ++k) x[k] = kept[w][k][lane];
    S other;
    other.load(x);
    sums.merge(other, scale);
  }
  const int64_t action = out.actions[row];
  RowInfo<Op> info{};
  info.action = action >= 0 && action < columns ? int(action) : -1;
  info.chosen = info.action >= 0 ? from.chosen[row] : -infinity();
  info.index = row;
  op.finish(info, sums, RowSum(sums.max, sums.sum, info.chosen, scale), scale, 0);
}

template <class T, class Tile, class Out>
cudaError_t linear_stats_as(const LinearArgs& args, const RowOutputs& out, cudaStream_t stream,
                            const Tuning& tuning = {}, Keep keep_logits = Keep::first_out) {
  if (args.rows == 0) return cudaSuccess;
  constexpr int64_t kLimit = (int64_t(1) << 31) - 4096;
  if (args.rows >= kLimit || args.columns >= kLimit || args.depth >= kLimit)
    return cudaErrorInvalidValue;
  const int64_t tiles = (args.columns + Tile::kCols - 1) / Tile::kCols;
  SumTiles<T, Out> sums{};
  sums.to = TileSums(args.scratch, args.rows, tiles, out.entropy);
  sums.bias = static_cast<const T*>(args.bias);
  sums.actions = out.actions;
  sums.rows = int(args.rows), sums.columns = int(args.columns);
  sums.scale = Scale(args.scaling);
  if constexpr (sums.kStores) {
    const Matrix logits{args.logits, args.logits_type, args.rows, args.columns, args.logits_stride};
    if (cudaError_t e = sums.logits.encode(logits, keep_logits)) return e;
  }
  const Matrix a{args.hidden, args.type, args.rows, args.depth, args.hidden_stride};
  const Matrix b{args.weight, args.type, args.columns, args.depth, args.weight_stride};
  if (cudaError_t e = launch_gemm<T, Tile>(a, b, sums, stream, tuning)) return e;
  auto merge = out.entropy ? merge_tiles_kernel<true> : merge_tiles_kernel<false>;
  const int blocks = int((args.rows + 31) / 32);
  merge<<<blocks, 32 * kMergeWarps, 0, stream>>>(sums.to, int(tiles), sums.rows, sums.columns,
                                                 args.mask, sums.scale, out);
  return cudaGetLastError();
}

}  // namespace klq::cuda
