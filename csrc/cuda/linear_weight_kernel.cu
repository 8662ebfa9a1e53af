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
[[maybe_unused]] __device__ __forceinline__ uint32_t staged(uint32_t staging, int v, int d) {
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
#pragma unroll
    for (int piece = 0; piece < 2 * N / kPiece; ++piece) {
      const int from = column + kPiece * piece;
      if (from >= columns) break;
      // reckoned anew for each piece, what hangs on these two takes fewer registers
      asm volatile("" : "+r"(lane), "+r"(staging));
      const int slot = slots && from + lane < columns ? slots[from + lane] : -1;
      __syncwarp();  // the piece before has been read
      stage(c, piece, staging, lane);
      __syncwarp();
      for (uint32_t left = __ballot_sync(~0u, slot >= 0); left; left &= left - 1) {
        const int v = __ffs(left) - 1, at = __shfl_sync(~0u, slot, v);
        if (lane < 16 && row + lane < depth) {
          const uint32_t place = staged(staging, v, lane);
          float x;
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(place) : "memory");
          x += extra[int64_t(at) * depth + (row + lane)];
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(place), "f"(x) : "memory");
        }
        __syncwarp();
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int v = half * 16 + lane / 2, d = lane % 2 * 8;
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float two[2];
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                       : "=f"(two[0]), "=f"(two[1])
                       : "r"(staged(staging, v, d + 2 * k))
                       : "memory");
          packed[k] = Vec<bf16>::pack(two);
        }
        if (from + v < columns && row + d < depth)
          *reinterpret_cast<uint4*>(out + (int64_t(from + v) * depth + (row + d))) =
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

__device__ __forceinline__ bool has_chosen(const ChosenArgs& a, int64_t row) {
  return a.own[row] != 0.0f && a.actions[row] >= 0 && a.actions[row] < a.columns;
}

// slots and counts are all -1 before.
__global__ void __launch_bounds__(kThreads) first_tokens_kernel(const ChosenArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= a.rows || !has_chosen(a, row)) return;
  const int64_t action = a.actions[row];
  atomicMin(reinterpret_cast<uint32_t*>(a.slots) + action, uint32_t(row));
  atomicAdd(a.slots + a.columns + action, 1);
}

// One block a slice of the depth of each token that is the first of its action, 8 elements a
// thread. The block looks for the others among the tokens after it, and adds them in order.
__global__ void __launch_bounds__(kThreads) chosen_kernel(const ChosenArgs a) {
  using V = Vec<bf16>;
  const int64_t first = blockIdx.x;
  if (!has_chosen(a, first)) return;
  const int64_t action = a.actions[first];
  if (a.slots[action] != int32_t(first)) return;
  const int64_t d = V::kWidth * (int64_t(blockIdx.y) * kThreads + threadIdx.x);
  const bool in = a.out && d < a.depth;
  float bias = 0.0f;
  auto out = reinterpret_cast<float4*>(a.out + (a.apart ? first : action) * a.depth + d);
  float4 sum[2] = {};
  if (in && !a.apart) sum[0] = out[0], sum[1] = out[1];
  auto add = [&](const int64_t (&rows)[kAhead], int count) {
    for (int k = 0; a.bias && d == 0 && k < count; ++k) {
      const float own = a.own[rows[k]], owns[2] = {own, own};
      float stored[2];
      V::unpack(V::pack(owns), stored);
      bias += a.scale[rows[k]] * (own - stored[0]);
    }
    if (!in) return;
    uint4 packed[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      auto h = static_cast<const bf16*>(a.hidden) + rows[k] * a.hidden_stride + d;
      packed[k] = k < count ? *reinterpret_cast<const uint4*>(h) : uint4{};
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k >= count) break;
      const float own = a.own[rows[k]], scale = a.scale[rows[k]], owns[2] = {own, own};
      const uint32_t words[4] = {packed[k].x, packed[k].y, packed[k].z, packed[k].w};
      float stored[2], made[8];
      V::unpack(V::pack(owns), stored);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float h[2], rounded[2];
        V::unpack(words[w], h);
        const float scaled[2] = {scale * h[0], scale * h[1]};
        V::unpack(V::pack(scaled), rounded);
#pragma unroll
        for (int i = 0; i < 2; ++i) made[2 * w + i] = scale * own * h[i] - stored[i] * rounded[i];
      }
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const float* x = made + 4 * q;
        sum[q].x += x[0], sum[q].y += x[1], sum[q].z += x[2], sum[q].w += x[3];
      }
    }
  };
  const int64_t alone[kAhead] = {first, first, first, first};
  add(alone, 1);
  __shared__ int found[kThreads], ends[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int left = a.slots[a.columns + action];
  for (int64_t from = first + 1; left > 0 && from < a.rows; from += kThreads) {
    const int64_t row = from + threadIdx.x;
    const bool same = row < a.rows && a.actions[row] == action && a.own[row] != 0.0f;
    const uint32_t those = __ballot_sync(~0u, same);
    if (lane == 0) ends[warp] = __popc(those);
    __syncthreads();
    int before = 0, count = 0;
    for (int w = 0; w < kThreads / 32; ++w) before += w < warp ? ends[w] : 0, count += ends[w];
    if (same) found[before + __popc(those & ((1u << lane) - 1))] = int(threadIdx.x);
    __syncthreads();
    for (int p = 0; p < count; p += kAhead) {
      int64_t rows[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) rows[k] = from + found[min(p + k, count - 1)];
      add(rows, min(count - p, kAhead));
    }
    left -= count;
    __syncthreads();
  }
  if (in) out[0] = sum[0], out[1] = sum[1];
  if (a.bias && d == 0) a.bias[action] += bias;
}

}  // namespace

cudaError_t linear_weight(const WeightArgs& args, cudaStream_t stream) {
  if (args.columns == 0 || args.depth == 0) return cudaSuccess;
  if (args.type == Type::f32)
    return args.add ? run_sum<true>(args, stream) : run_sum<false>(args, stream);
  const Narrowed out{static_cast<bf16*>(args.out), int(args.depth), int(args.columns), args.slots,
                     args.extra};
  return run(args, out, stream);
}

cudaError_t linear_chosen(const ChosenArgs& args, cudaStream_t stream) {
  if (args.columns == 0) return cudaSuccess;
  if (args.rows >= int64_t(1) << 31) return cudaErrorInvalidValue;
  const size_t bytes = 2 * sizeof(int32_t) * args.columns;
  if (cudaError_t e = cudaMemsetAsync(args.slots, 0xff, bytes, stream)) return e;
  if (args.rows == 0) return cudaSuccess;
  auto blocks = [](int64_t n, int each) { return unsigned((n + each - 1) / each); };
  first_tokens_kernel<<<blocks(args.rows, kThreads), kThreads, 0, stream>>>(args);
  if (cudaError_t e = cudaGetLastError()) return e;
  const dim3 grid(unsigned(args.rows), args.out ? blocks(args.depth, 8 * kThreads) : 1);
  chosen_kernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace klq::cuda
