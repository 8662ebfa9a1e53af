// SPDX-License-Identifier: Apache-2.0
// dW of the LM head: both operands lie across. Tiles are of its transpose, since the width of a
// model divides by a cluster's 256 rows and a vocabulary is too large to lose by tiles of 192. They
// go from registers through shared memory to the copy engine, which adds them into the float32 sum
// under the other warpgroup's products.
//
// Measured and dropped (H200, 2026-11-26; 1536 x 2048 x 151936, ms; 1.34 without an epilogue, 1.41
// this one): `red` from registers 1.44, with a hint that what it touches may leave L2 1.45, loads
// and stores 2.72; the library's product 1.68.
#include "cuda/gemm.cuh"
#include "cuda/linear_weight.h"

namespace klq::cuda {
namespace {

using Tile = Tiling<2, 192, 5, 2, true, true>;

constexpr int kPiece = 32;  // columns of the tile, rows of out, on their way at a time

// Where element (v, d) of a piece lies in a warp's staging memory: rows of 64 bytes, whose 16-byte
// units are in the copy engine's order, unit u of row v at u ^ v / 2 % 4.
__device__ __forceinline__ uint32_t staged(uint32_t staging, int v, int d) {
  return staging + v * 64 + ((d / 4) ^ (v / 2 % 4)) * 16 + d % 4 * 4;
}

// A piece of a fragment, whose rows are columns of out, into staging memory.
template <int N>
__device__ __forceinline__ void stage(const float (&c)[N], int piece, uint32_t staging, int lane) {
#pragma unroll
  for (int k = 0; k < kPiece / 2; ++k) {
    const int v = k / 4 * 8 + 2 * (lane % 4) + k % 2, d = lane / 4 + k / 2 % 2 * 8;
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(staged(staging, v, d)),
                 "f"(c[kPiece / 2 * piece + k])
                 : "memory");
  }
}

template <bool ADD>
struct IntoSum {
  CUtensorMap map;  // of out, in boxes of kPiece rows of 16 elements
  int depth, columns;

  template <int N>
  __device__ __forceinline__ void finish(const float (&c)[N], int row, int column, uint32_t staging,
                                         int lane) const {
    if (row >= depth) return;
#pragma unroll
    for (int piece = 0; piece < 2 * N / kPiece; ++piece) {
      const int from = column + kPiece * piece;
      if (from >= columns) break;
      if (lane == 0) stores_read();  // the piece before has left the buffer
      __syncwarp();
      stage(c, piece, staging, lane);
      copies_see_stores();
      __syncwarp();
      if (lane == 0) {
        if (ADD)
          add_box(map, from, row, staging);
        else
          store_box(map, from, row, staging, normal_policy());
      }
    }
  }
};

// Rounded; 16 bytes a lane, two lanes to a row's 16 elements.
struct Narrowed {
  bf16* out;
  int depth, columns;
  const int32_t* slots;
  const float* extra;

  template <int N>
  __device__ __forceinline__ void finish(const float (&c)[N], int row, int column, uint32_t staging,
                                         int lane) const {
    if (row >= depth) return;
    const int d = lane % 2 * 8;
#pragma unroll
    for (int piece = 0; piece < 2 * N / kPiece; ++piece) {
      const int from = column + kPiece * piece;
      if (from >= columns) break;
      const int slot = slots && from + lane < columns ? slots[from + lane] : -1;
      __syncwarp();  // the piece before has been read
      stage(c, piece, staging, lane);
      __syncwarp();
      for (uint32_t left = __ballot_sync(~0u, slot >= 0); left; left &= left - 1) {
        const int v = __ffs(left) - 1;
        const int64_t at = __shfl_sync(~0u, slot, v);
        if (lane < 16 && row + lane < depth) {
          const uint32_t place = staged(staging, v, lane);
          float x;
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(place) : "memory");
          x += extra[at * depth + row + lane];
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(place), "f"(x) : "memory");
        }
        __syncwarp();
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int v = half * 16 + lane / 2;
        const uint4 x = load_shared(staged(staging, v, d)),
                    y = load_shared(staged(staging, v, d + 4));
        const uint32_t w[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float two[2] = {__uint_as_float(w[2 * k]), __uint_as_float(w[2 * k + 1])};
          packed[k] = Vec<bf16>::pack(two);
        }
        if (from + v < columns && row + d < depth)
          *reinterpret_cast<uint4*>(out + int64_t(from + v) * depth + row + d) =
              make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }
};

template <class Epilogue>
cudaError_t run(const WeightArgs& args, const Epilogue& epilogue, cudaStream_t stream) {
  const Matrix a{args.hidden, Type::bf16, args.rows, args.depth, args.hidden_stride};
  const Matrix b{args.dlogits, Type::bf16, args.rows, args.columns, args.dlogits_stride};
  return launch_gemm<Tile>(a, b, epilogue, stream);
}

template <bool ADD>
cudaError_t run_sum(const WeightArgs& args, cudaStream_t stream) {
  using Sum = IntoSum<ADD>;
  Sum sum{{}, int(args.depth), int(args.columns)};
  const Matrix out{args.out, Type::f32, args.columns, args.depth, args.depth};
  if (cudaError_t e = map_boxes(&sum.map, out, kPiece, 16)) return e;
  return run(args, sum, stream);
}

constexpr int kThreads = 256, kAhead = 4;

// One block a slice of the depth of each token that is the first of its action; 8 elements a
// thread. Tokens of one action are loaded several at a time and added one by one.
__global__ void __launch_bounds__(kThreads) chosen_kernel(const ChosenArgs a) {
  using V = Vec<bf16>;
  const int64_t first = blockIdx.x;
  const int64_t action = a.actions[first];
  if (action < 0 || action >= a.columns || (first > 0 && a.actions[first - 1] == action)) return;
  const int64_t d = V::kWidth * (int64_t(blockIdx.y) * kThreads + threadIdx.x);
  if (d >= a.depth) return;
  const int64_t at = a.slots ? first : action;
  auto out = reinterpret_cast<float4*>(a.out + at * a.depth + d);
  const float4 none{}, before[2] = {a.slots ? none : out[0], a.slots ? none : out[1]};
  if (a.slots && d == 0) a.slots[action] = int32_t(first);
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
  if (args.type == Type::f32)
    return args.add ? run_sum<true>(args, stream) : run_sum<false>(args, stream);
  const Narrowed out{static_cast<bf16*>(args.out), int(args.depth), int(args.columns), args.slots,
                     args.extra};
  return run(args, out, stream);
}

cudaError_t linear_chosen(const ChosenArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  const dim3 grid(unsigned(args.rows), unsigned((args.depth + 8 * kThreads - 1) / (8 * kThreads)));
  chosen_kernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace klq::cuda
