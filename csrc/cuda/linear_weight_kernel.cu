// SPDX-License-Identifier: Apache-2.0
// dW of the LM head: both operands lie across, so tiles of its transpose go straight from registers
// into the float32 sum, 32 bytes of 4 rows a warp at a time, under the other warpgroup's products.
// The transpose, since the width of a model divides by a cluster's 256 rows and a vocabulary is too
// large to lose by tiles of 192.
#include "cuda/gemm.cuh"
#include "cuda/linear_weight.h"

namespace klq::cuda {
namespace {

using Tile = Tiling<2, 192, 5, 2, true, true>;

template <bool ADD>
struct IntoSum {
  float* out;
  int64_t stride;
  int depth, columns;

  template <int N>
  __device__ __forceinline__ void finish(const float (&c)[N], int row, int column, uint32_t,
                                         int lane) const {
    const int d = row + lane / 4, v = column + 2 * (lane % 4);
    float* to = out + v * stride + d;
    if (row + 16 <= depth && column + 2 * N <= columns)
      each(c, to, [](int, int) { return true; });
    else
      each(c, to, [&](int h, int at) { return d + 8 * h < depth && v + at < columns; });
  }

  template <int N, class Inside>
  __device__ __forceinline__ void each(const float (&c)[N], float* to, Inside inside) const {
#pragma unroll
    for (int j = 0; j < N / 4; ++j, to += 8 * stride)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (!inside(h, 8 * j + i)) continue;
          float* at = to + i * stride + 8 * h;
          const float x = c[4 * j + 2 * h + i];
          if constexpr (ADD)
            asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(x));
          else
            *at = x;
        }
  }
};

template <bool ADD>
cudaError_t run(const WeightArgs& args, cudaStream_t stream) {
  const Matrix a{args.hidden, Type::bf16, args.rows, args.depth, args.hidden_stride};
  const Matrix b{args.dlogits, Type::bf16, args.rows, args.columns, args.dlogits_stride};
  const IntoSum<ADD> sum{args.out, args.stride, int(args.depth), int(args.columns)};
  return launch_gemm<Tile>(a, b, sum, stream);
}

constexpr int kThreads = 256, kAhead = 4;

// One block a slice of the depth of each token that is the first of its action; 8 elements a
// thread. Tokens of one action are loaded several at a time and added one by one.
__global__ void __launch_bounds__(kThreads) chosen_kernel(const ChosenArgs a) {
  using V = Vec<bf16>;
  const int64_t first = blockIdx.x;
  const int action = a.actions[first];
  if (first > 0 && a.actions[first - 1] == action) return;
  const int64_t d = V::kWidth * (int64_t(blockIdx.y) * kThreads + threadIdx.x);
  if (d >= a.depth) return;
  auto out = reinterpret_cast<float4*>(a.out + action * a.stride + d);
  const float4 before[2] = {out[0], out[1]};
  float sum[V::kWidth] = {};
  for (int64_t p = first; p < a.rows && a.actions[p] == action; p += kAhead) {
    uint4 packed[kAhead];
    float own[kAhead], scale[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool in = p + k < a.rows && a.actions[p + k] == action;
      const int64_t row = in ? a.order[p + k] : 0;
      own[k] = in ? a.own[row] : 0.0f, scale[k] = in ? a.scale[row] : 0.0f;
      auto h = static_cast<const bf16*>(a.hidden) + row * a.hidden_stride + d;
      // 0: inactive, or alone in its row
      packed[k] = own[k] == 0.0f ? uint4{} : *reinterpret_cast<const uint4*>(h);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (own[k] == 0.0f) continue;
      const uint32_t words[4] = {packed[k].x, packed[k].y, packed[k].z, packed[k].w};
      const float owns[2] = {own[k], own[k]};
      float stored[2];
      V::unpack(V::pack(owns), stored);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float h[2], rounded[2];
        V::unpack(words[w], h);
        const float scaled[2] = {scale[k] * h[0], scale[k] * h[1]};
        V::unpack(V::pack(scaled), rounded);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          sum[2 * w + i] += scale[k] * own[k] * h[i] - stored[i] * rounded[i];
      }
    }
  }
#pragma unroll
  for (int q = 0; q < 2; ++q)
    out[q] = make_float4(before[q].x + sum[4 * q], before[q].y + sum[4 * q + 1],
                         before[q].z + sum[4 * q + 2], before[q].w + sum[4 * q + 3]);
}

}  // namespace

cudaError_t linear_weight(const WeightArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0 || args.depth == 0) return cudaSuccess;
  return args.add ? run<true>(args, stream) : run<false>(args, stream);
}

cudaError_t linear_chosen(const ChosenArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const dim3 grid(unsigned(args.rows), unsigned((args.depth + 8 * kThreads - 1) / (8 * kThreads)));
  chosen_kernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace klq::cuda
