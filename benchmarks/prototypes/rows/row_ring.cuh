// SPDX-License-Identifier: Apache-2.0
// One read (and, with a gradient, one write) of every row of logits: each row stays in shared
// memory between its sum and its gradient.
//
// Persistent clusters of 1 to 8 blocks walk over the rows; each block holds a slice of the row. One
// producer warp keeps a ring of shared-memory stages full with bulk copies, across row boundaries,
// so that the next row is already arriving while this one is reduced and written. Consumers visit a
// stage once for (max, sum) and, with a gradient, once more; only then is it refilled. The partial
// sums of all warps of all blocks of the cluster meet through asynchronous stores that a barrier
// counts; every thread merges them in the same order, so results are the same bits on every run.
//
// The chosen token's term stays out of the sum (`rest`), which keeps 1 - p exact when p is near 1.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/rows.h"
#include "cuda/vec.cuh"

namespace klq::cuda {

// What a row comes to: p_j = e^(z'_j - max) / sum.
struct RowSum {
  float max, rest, chosen;  // chosen = z' of the action, -inf if it is none of the row's columns

  __device__ float sum() const { return rest + exp_from(chosen, max * kLog2e); }
  // log pi = (chosen - max) - log sum; NaN where the row's max is not finite
  __device__ float logprob() const {
    if (!(fabsf(max) < __int_as_float(0x7f800000))) return __int_as_float(0x7fc00000);
    const float x = chosen == max ? -log1pf(rest) : (chosen - max) - logf(sum());
    return x > 0.0f ? 0.0f : x;  // never above 0; NaN passes
  }
};

// First element of row i. Rows are fewer than 2^31 (checked by the glue), which spares a 64-bit
// division: at 50304 columns four of those a row cost a quarter of the pass (H200, 2026-11-22).
template <class T>
__device__ __forceinline__ T* row_of(const Rows& r, int64_t i) {
  T* data = static_cast<T*>(r.data);
  if (r.inner >= r.count) return data + i * r.inner_stride;
  const uint32_t outer = uint32_t(i) / uint32_t(r.inner);
  return data + outer * r.outer_stride + (i - outer * r.inner) * r.inner_stride;
}

// One row cut into 16-byte vectors; up to kWidth - 1 elements at either end are `edges`.
template <class T>
struct Slices {
  static constexpr int kWidth = Vec<T>::kWidth;
  T* row;
  int head, body, tail;  // elements, vectors, elements

  __device__ Slices(const Rows& r, int64_t i) {
    row = row_of<T>(r, i);
    const uint32_t misaligned = uint32_t(reinterpret_cast<uintptr_t>(row) & 15);
    head = misaligned ? int((16 - misaligned) / sizeof(T)) : 0;
    head = int(min(int64_t(head), r.width));
    body = int((r.width - head) / kWidth);
    tail = int(r.width - head - int64_t(body) * kWidth);
  }
  __device__ uint4* vectors() const { return reinterpret_cast<uint4*>(row + head); }
  // column of edge element e (head first), or -1
  __device__ int64_t edge_column(int e) const {
    if (e < head) return e;
    return e < head + tail ? int64_t(body) * kWidth + e : -1;
  }
};

template <class T, bool SCALED, class Op, int NC, int U, int STAGES, int CLUSTER>
__global__ void __launch_bounds__(NC + 32)
    row_ring_kernel(const Rows rows, const Scale scale, const Op op) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using V = Vec<T>;
  constexpr int kStage = NC * U;  // vectors
  constexpr int kWarps = NC / 32, kPairs = kWarps * CLUSTER, kWords = 4;
  constexpr int kPer = V::kWidth / kWords;  // elements a 32-bit word
  extern __shared__ __align__(128) uint4 stages[];
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES], exchanged[2];
  __shared__ __align__(8) float2 pairs[2][kPairs];

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int rank = CLUSTER > 1 ? int(cluster_rank()) : 0;
  const int64_t first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
  if (thread == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), kWarps);
    }
    for (int i = 0; i < 2; ++i)
      barrier_init(shared_address(&exchanged[i]), CLUSTER > 1 ? 1 : kWarps);
    barrier_fence_init();
  }
  if (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();

  const int64_t active = rows.list ? int64_t(*rows.active) : rows.count;
  // this block's vectors of a row, and how they spread over chunks of at most a stage
  auto begin_of = [&](int body) { return min(body, (body + CLUSTER - 1) / CLUSTER * rank); };
  auto count_of = [&](int body) {
    return min((body + CLUSTER - 1) / CLUSTER, body - begin_of(body));
  };
  const int chunk = (((rows.max_body + CLUSTER - 1) / CLUSTER) + rows.chunks - 1) / rows.chunks;

  if (warp == kWarps) {
    if (lane == 0) {  // the producer
      int stage = 0;
      uint32_t phase = 1;
      for (int64_t i = first; i < active; i += step) {
        const Slices<T> s(rows, rows.list ? rows.list[i] : i);
        const uint4* from = s.vectors() + begin_of(s.body);
        const int mine = count_of(s.body);
        for (int c = 0; c < rows.chunks; ++c) {
          const int n = max(0, min(chunk, mine - c * chunk));
          const uint32_t bar = shared_address(&full[stage]);
          barrier_wait(shared_address(&empty[stage]), phase);
          barrier_expect(bar, n * 16);
          if (n) bulk_load(shared_address(stages + stage * kStage), from + c * chunk, n * 16, bar);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    int stage = 0;
    uint32_t phase = 0, parity = 0, slot = 0;
    for (int64_t i = first; i < active; i += step) {
      const int64_t r = rows.list ? rows.list[i] : i;
      const Slices<T> s(rows, r);
      // the row's own inputs are asked for first and used last: their latency hides behind the row
      const auto inputs = op.load(r);
      const int64_t action = inputs.action;
      const bool known = action >= 0 && action < rows.width;
      // read before anyone may write this row: the pair sent below depends on it
      const float chosen_z = known ? V::one(s.row + action) : minus_infinity();
      const float chosen = scaled<SCALED>(chosen_z, scale);
      const int mine = count_of(s.body), first_vector = begin_of(s.body);
      const int64_t in_body = known ? action - s.head : -1;
      const int hit = in_body < 0 ? -1 : int(in_body / V::kWidth) - first_vector;
      const int hit_element = in_body < 0 ? 0 : int(in_body % V::kWidth);
      const int64_t edge_column = rank == 0 && warp == 0 ? s.edge_column(lane) : -1;
      const float edge_z = edge_column >= 0 && edge_column != action ? V::one(s.row + edge_column)
                                                                     : minus_infinity();
      if (CLUSTER > 1 && thread == 0) barrier_expect(shared_address(&exchanged[slot]), 8 * kPairs);

      Online mine_sum;
      const int stage0 = stage;
      for (int c = 0; c < rows.chunks; ++c) {
        barrier_wait(shared_address(&full[stage]), phase);
        const int n = min(chunk, mine - c * chunk), target = hit - c * chunk;
        uint32_t w[U][kWords];
        uint32_t top = V::kMinusInf;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int v = thread + u * NC;
          const uint32_t none = V::kMinusInf;
          const uint4 x = v < n ? stages[stage * kStage + v] : make_uint4(none, none, none, none);
          w[u][0] = x.x, w[u][1] = x.y, w[u][2] = x.z, w[u][3] = x.w;
          if (v == target && v < n) {
#pragma unroll
            for (int k = 0; k < kWords; ++k)
              w[u][k] = k == hit_element / kPer ? V::drop(w[u][k], hit_element) : w[u][k];
          }
#pragma unroll
          for (int k = 0; k < kWords; ++k) top = V::max(top, w[u][k]);
        }
        mine_sum.raise(scaled<SCALED>(V::top(top), scale));
        const float point = mine_sum.point();
        float parts[2] = {0.0f, 0.0f};
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
          for (int k = 0; k < kWords; ++k) {
            float z[kPer];
            V::unpack(w[u][k], z);
#pragma unroll
            for (int e = 0; e < kPer; ++e)
              parts[(k * kPer + e) & 1] += exp_from(scaled<SCALED>(z[e], scale), point);
          }
        }
        mine_sum.sum += parts[0] + parts[1];
        if (!Op::kGrad) {
          __syncwarp();
          if (lane == 0) barrier_arrive(shared_address(&empty[stage]));
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      {  // the edge elements
        const float t = scaled<SCALED>(edge_z, scale);
        mine_sum.raise(t);
        mine_sum.sum += exp_from(t, mine_sum.point());
      }

      mine_sum.raise(chosen);  // the row's max includes the chosen token, its sum does not
      mine_sum.merge_warp();
      const uint32_t bar = shared_address(&exchanged[slot]);
      if (CLUSTER > 1) {
        const uint32_t to = shared_address(&pairs[slot][rank * kWarps + warp]);
        if (lane < CLUSTER)
          send_pair(in_block(to, lane), mine_sum.max, mine_sum.sum, in_block(bar, lane));
      } else if (lane == 0) {
        pairs[slot][warp] = make_float2(mine_sum.max, mine_sum.sum);
        barrier_arrive(bar);
      }
      barrier_wait<(CLUSTER > 1)>(bar, parity);
      Online all;
#pragma unroll
      for (int p = 0; p < kPairs; p += 32) {
        const bool there = p + lane < kPairs;
        const float2 pair = there ? pairs[slot][p + lane] : make_float2(minus_infinity(), 0.0f);
        all.merge(pair.x, pair.y);
      }
      all.merge_warp();
      slot ^= 1;
      if (slot == 0) parity ^= 1;

      const RowSum sum{all.max, all.sum, chosen};
      const float coefficient = op.finish(r, inputs, sum, known, rank == 0 && thread == 0);
      if (!Op::kGrad) continue;

      // second visit: coefficient (onehot - softmax) dz'/dz
      const float point = all.point(), total = sum.sum();
      const float factor = -coefficient / total;
      const float at_target = chosen_z == minus_infinity() ? 0.0f
                                                           : coefficient * (sum.rest / total) *
                                                                 slope<SCALED>(chosen_z, scale);
      auto gradient = [&](float z) {
        return factor * slope<SCALED>(z, scale) * exp_from(scaled<SCALED>(z, scale), point);
      };
      T* out = op.template gradient_row<T>(r, s.row);
      uint4* out_vectors = reinterpret_cast<uint4*>(out + s.head) + first_vector;
      stage = stage0;
      for (int c = 0; c < rows.chunks; ++c) {
        const int n = min(chunk, mine - c * chunk), target = hit - c * chunk;
        uint4 x[U];
#pragma unroll
        for (int u = 0; u < U; ++u)
          if (thread + u * NC < n) x[u] = stages[stage * kStage + thread + u * NC];
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&empty[stage]));
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int v = thread + u * NC;
          if (v >= n) continue;
          const uint32_t in[kWords] = {x[u].x, x[u].y, x[u].z, x[u].w};
          uint32_t w[kWords];
#pragma unroll
          for (int k = 0; k < kWords; ++k) {
            float z[kPer];
            V::unpack(in[k], z);
#pragma unroll
            for (int e = 0; e < kPer; ++e) {
              z[e] = gradient(z[e]);
              if (v == target && k * kPer + e == hit_element) z[e] = at_target;
            }
            w[k] = V::pack(z);
          }
          __stcs(out_vectors + c * chunk + v, make_uint4(w[0], w[1], w[2], w[3]));
        }
        if (++stage == STAGES) stage = 0;
      }
      if (edge_column >= 0)
        V::put(out + edge_column, edge_column == action ? at_target : gradient(edge_z));
    }

    if (rows.list) {  // inactive rows: outputs 0, gradient 0, logits not read
      for (int64_t i = first; i < rows.count - active; i += step) {
        const int64_t r = rows.list[rows.count - 1 - i];
        if (rank == 0 && thread == 0) op.inactive(r);
        if (!Op::kGrad) continue;
        const Slices<T> s(rows, r);
        T* out = op.template gradient_row<T>(r, s.row);
        uint4* to = reinterpret_cast<uint4*>(out + s.head) + begin_of(s.body);
        for (int v = thread; v < count_of(s.body); v += NC) __stcs(to + v, make_uint4(0, 0, 0, 0));
        const int64_t column = rank == 0 && warp == 0 ? s.edge_column(lane) : -1;
        if (column >= 0) V::put(out + column, 0.0f);
      }
    }
  }
  if (CLUSTER > 1) cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace klq::cuda
