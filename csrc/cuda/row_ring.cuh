// SPDX-License-Identifier: Apache-2.0
// One read (and, with a gradient, one write) of every row of logits, on Hopper and later: a row
// stays in shared memory between its sum and its gradient.
//
// Persistent clusters of 1 to 8 blocks walk over the rows; each block holds a slice of the row. The
// warps of a block have three roles, and no role ever waits for a row's latencies:
//   - the producer keeps a ring of shared-memory stages full with bulk copies, across row borders,
//     and looks up what a row needs (its action and other inputs), 32 rows at a time;
//   - summers visit each stage once and leave one partial sum a warp and row;
//   - closers merge the partial sums of all blocks of the cluster, always in the same order, so
//     that results are the same bits on every run; with a gradient they then visit the stages again
//     and write it, while the summers are at the next row. Only then is a stage refilled.
// Sums meet in `slots`, one a row, used in turn. With a gradient a row holds at least one stage
// until its closers are done, so no role can be more than kStages rows ahead of a later role of its
// block, nor 2 kStages ahead of another block's: kSlots covers that. Without one, summers wait
// until the row kSlots / 2 before theirs is `closed`.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/row_sums.cuh"

namespace klq::cuda {

constexpr int kSlots = 32;

// threads that sum, threads that close, vectors a summer takes of a stage, stages, blocks an SM
template <int SUM, int CLOSE, int U, int STAGES, int BLOCKS>
struct RingShape {
  static constexpr int kSum = SUM, kClose = CLOSE, kUnroll = U, kStages = STAGES, kBlocks = BLOCKS;
  static constexpr int kStage = SUM * U;  // vectors
  static constexpr int kThreads = SUM + CLOSE + 32;
  static constexpr int kBytes = STAGES * kStage * 16;
  static_assert(2 * STAGES + 2 <= kSlots);
};

// How the rows spread over blocks: set by the launcher from shapes alone.
struct Ring {
  int cluster;  // blocks that share a row
  int slice;    // vectors of a row a block holds, at most
  int chunk;    // vectors of a slice in one stage, at most
  int chunks;   // stages a slice takes
};

template <class T, bool CAPPED, class Op, bool CLUSTERED, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    row_ring_kernel(const Rows rows, const Rows ref, const Rows gradients,
                    const ActiveRows active_rows, const Ring ring, const Scale scale, const Op op) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using V = Vec<T>;
  constexpr bool kRef = Op::kRef, kGrad = Op::kGrad;
  using Sum = Sums<kRef, Op::kMoments>;
  constexpr int kStages = Shape::kStages, kStage = Shape::kStage, U = Shape::kUnroll;
  constexpr int kSummers = Shape::kSum / 32, kClosers = Shape::kClose / 32;
  constexpr int kPairs = kSummers * (CLUSTERED ? 8 : 1), kWords = 4, kPer = V::kPer;
  constexpr int kRows = 1 + kRef;  // stages a chunk takes
  extern __shared__ __align__(128) uint4 stages[];
  __shared__ __align__(8) uint64_t full[kStages], empty[kStages], ready[kSlots], closed[kSlots];
  __shared__ __align__(16) float partial[kSlots][kPairs][Sum::kFloats];
  __shared__ RowInfo<Op> infos[kSlots];

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int cluster = CLUSTERED ? ring.cluster : 1, pairs = kSummers * cluster;
  const int rank = CLUSTERED ? int(cluster_rank()) : 0;
  const int64_t first = blockIdx.x / cluster, step = gridDim.x / cluster;
  const int width = int(rows.width);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), kGrad ? kClosers : kSummers);
    }
    for (int i = 0; i < kSlots; ++i) {
      // in a cluster the sums come as bytes that the barrier counts, from every block
      barrier_init(shared_address(&ready[i]), CLUSTERED ? 1 : kSummers);
      barrier_init(shared_address(&closed[i]), 1);
      if (CLUSTERED) barrier_expect(shared_address(&ready[i]), 8 * pairs);
    }
    barrier_fence_init();
  }
  if (CLUSTERED)
    cluster_sync();
  else
    __syncthreads();

  const int64_t active = active_rows.list ? int64_t(*active_rows.active) : rows.count;
  // this block's vectors of a row
  auto begin_of = [&](int body) { return min(body, ring.slice * rank); };
  auto count_of = [&](int body) { return min(ring.slice, body - begin_of(body)); };

  if (warp == kSummers + kClosers) {
    // --- producer: lane j looks up and loads every 32nd row
    uint32_t done = 0;  // stages asked for so far
    int slot = 0;
    for (int64_t batch = first; batch < active; batch += 32 * step) {
      const int64_t i = batch + lane * step;
      RowInfo<Op> info;
      if (i < active) {
        const int64_t r = active_rows.list ? active_rows.list[i] : i;
        const int64_t action = op.action(r);
        const T* row = row_of<T>(rows, r);
        const T* ref_row = kRef ? row_of<T>(ref, r) : row;
        const bool known = action >= 0 && action < width;
        info.row = reinterpret_cast<char*>(const_cast<T*>(row));
        info.ref = reinterpret_cast<char*>(const_cast<T*>(ref_row));
        info.index = int(r);
        info.action = known ? int(action) : -1;
        info.chosen_z = known ? V::get(row + action) : -infinity();
        info.chosen = capped<CAPPED>(info.chosen_z, scale);
        info.ref_chosen =
            kRef && known ? capped<CAPPED>(V::get(ref_row + action), scale) : -infinity();
        info.inputs = op.load(r);
      }
      const int there = int(min(int64_t(32), (active - batch + step - 1) / step));
      for (int j = 0; j < there; ++j) {
        if (lane == j) {
          infos[slot] = info;
          const T* row = reinterpret_cast<const T*>(info.row);
          const Cut<T> cut(row, width);
          const uint4* from = reinterpret_cast<const uint4*>(row + cut.head) + begin_of(cut.body);
          const uint4* ref_from =
              reinterpret_cast<const uint4*>(reinterpret_cast<const T*>(info.ref) + cut.head) +
              begin_of(cut.body);
          const int mine = count_of(cut.body);
          uint32_t stage = done % kStages, phase = done / kStages;
          for (int c = 0; c < ring.chunks; ++c) {
            const int n = max(0, min(ring.chunk, mine - c * ring.chunk));
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
              const uint32_t bar = shared_address(&full[stage]);
              barrier_wait(shared_address(&empty[stage]), (phase & 1) ^ 1);
              barrier_expect(bar, n * 16);
              if (n)
                bulk_load(shared_address(stages + stage * kStage),
                          (k ? ref_from : from) + c * ring.chunk, n * 16, bar);
              if (++stage == kStages) stage = 0, ++phase;
            }
          }
        }
        __syncwarp();
        done += ring.chunks * kRows;
        slot = (slot + 1) % kSlots;
      }
    }
  } else if (warp < kSummers) {
    // --- summers
    uint32_t stage = 0, phase = 0;
    int slot = 0, turn = 0;
    for (int64_t i = first; i < active; i += step) {
      barrier_wait(shared_address(&full[stage]), phase);  // infos[slot] was written before it
      const RowInfo<Op>& info = infos[slot];
      const T* row = reinterpret_cast<const T*>(info.row);
      const Cut<T> cut(row, width);
      const int mine = count_of(cut.body), in_body = info.action - cut.head;
      const int hit = in_body < 0 ? -1 : in_body / V::kWidth - begin_of(cut.body);
      const int hit_element = in_body & (V::kWidth - 1);
      const int edge = rank == 0 && warp == 0 ? cut.edge(lane) : -1;
      const bool has_edge = edge >= 0 && edge != info.action;
      const float edge_z = has_edge ? V::get(row + edge) : -infinity();
      const float edge_ref =
          kRef && has_edge ? V::get(reinterpret_cast<const T*>(info.ref) + edge) : -infinity();

      Sum sum;
      for (int c = 0; c < ring.chunks; ++c) {
        const int n = min(ring.chunk, mine - c * ring.chunk), target = hit - c * ring.chunk;
        uint32_t w[kRows][U][kWords], top[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          barrier_wait(shared_address(&full[stage]), phase);
          top[k] = V::kMinusInf;
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const int v = thread + u * Shape::kSum;
            constexpr uint32_t none = V::kMinusInf;
            const uint4 x = v < n ? stages[stage * kStage + v] : make_uint4(none, none, none, none);
            w[k][u][0] = x.x, w[k][u][1] = x.y, w[k][u][2] = x.z, w[k][u][3] = x.w;
          }
          if (target >= 0 && target < n) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
#pragma unroll
              for (int j = 0; j < kWords; ++j) {
                const int e = thread + u * Shape::kSum == target ? hit_element - j * kPer : -1;
                w[k][u][j] = V::drop(w[k][u][j], e);
              }
            }
          }
#pragma unroll
          for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int j = 0; j < kWords; ++j) top[k] = V::max(top[k], w[k][u][j]);
          }
          if (!kGrad) {
            __syncwarp();
            if (lane == 0) barrier_arrive(shared_address(&empty[stage]));
          }
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
        sum.raise(capped<CAPPED>(V::top(top[0]), scale),
                  kRef ? capped<CAPPED>(V::top(top[kRows - 1]), scale) : 0.0f, scale);
        const float point = scale.point(sum.max), ref_point = scale.point(sum.ref_max);
        Sum parts[2];
#pragma unroll
        for (int u = 0; u < U; ++u) {
#pragma unroll
          for (int j = 0; j < kWords; ++j) {
            float z[kPer], zr[kPer];
            V::unpack(w[0][u][j], z);
            if (kRef) V::unpack(w[kRows - 1][u][j], zr);
#pragma unroll
            for (int e = 0; e < kPer; ++e) {
              const float t = fmaf(capped<CAPPED>(z[e], scale), scale.factor, -point);
              const float q =
                  kRef ? fmaf(capped<CAPPED>(zr[e], scale), scale.factor, -ref_point) : 0.0f;
              parts[(j * kPer + e) & 1].add(t, q);
            }
          }
        }
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          sum.sum += parts[p].sum, sum.plain += parts[p].plain;
          sum.ref_sum += parts[p].ref_sum, sum.cross += parts[p].cross;
        }
      }
      {  // the edge elements, and the chosen token: in the maximum but not in the sum
        const float y = capped<CAPPED>(edge_z, scale), yr = capped<CAPPED>(edge_ref, scale);
        sum.raise(fmaxf(y, info.chosen), fmaxf(yr, info.ref_chosen), scale);
        if (edge >= 0)
          sum.add(fmaf(y, scale.factor, -scale.point(sum.max)),
                  fmaf(yr, scale.factor, -scale.point(sum.ref_max)));
      }
      sum.merge_warp(scale);
      const uint32_t bar = shared_address(&ready[slot]);
      if (!kGrad && (turn > 0 || slot >= kSlots / 2)) {
        const int before = (slot + kSlots / 2) % kSlots;
        barrier_wait(shared_address(&closed[before]), (slot < before ? turn - 1 : turn) & 1);
      }
      if constexpr (CLUSTERED) {
        const uint32_t to = shared_address(partial[slot][rank * kSummers + warp]);
        if (lane < cluster) send_pair(in_block(to, lane), sum.max, sum.sum, in_block(bar, lane));
      } else if (lane == 0) {
        sum.store(partial[slot][warp]);
        barrier_arrive(bar);
      }
      if (++slot == kSlots) slot = 0, ++turn;
    }
    if (kGrad && active_rows.list) {  // inactive rows: their logits are not read
      for (int64_t i = first; i < rows.count - active; i += step) {
        T* out = row_of<T>(gradients, active_rows.list[rows.count - 1 - i]);
        const Cut<T> cut(out, width);
        uint4* to = reinterpret_cast<uint4*>(out + cut.head) + begin_of(cut.body);
        const int mine = count_of(cut.body);
        for (int v = thread; v < mine; v += Shape::kSum) __stcs(to + v, make_uint4(0, 0, 0, 0));
        const int edge = rank == 0 && warp == 0 ? cut.edge(lane) : -1;
        if (edge >= 0) V::put(out + edge, 0.0f);
      }
    }
  } else {
    // --- closers
    const int me = thread - Shape::kSum;
    const bool writer = rank == 0 && me == 0;
    uint32_t stage = 0, parity = 0;
    int slot = 0;
    for (int64_t i = first; i < active; i += step) {
      const uint32_t bar = shared_address(&ready[slot]);
      barrier_wait<CLUSTERED>(bar, parity);
      Sum sum;
      if (lane < pairs) sum.load(partial[slot][lane]);
      if (kPairs > 32 && lane + 32 < pairs) {
        Sum other;
        other.load(partial[slot][lane + 32]);
        sum.merge(other, scale);
      }
      sum.merge_warp(scale);
      const RowInfo<Op>& info = infos[slot];
      if (CLUSTERED && me == 0) barrier_expect(bar, 8 * pairs);  // for the slot's next row
      if (++slot == kSlots) slot = 0, parity ^= 1;
      const RowSum total(sum.max, sum.sum, info.chosen, scale);
      const float coefficient = op.finish(info, sum, total, scale, writer);
      if constexpr (!kGrad) {
        __syncwarp();
        if (lane == 0) barrier_arrive(shared_address(&closed[(slot + kSlots - 1) % kSlots]));
      } else {
        const T* row = reinterpret_cast<const T*>(info.row);
        const Cut<T> cut(row, width);
        const int mine = count_of(cut.body), in_body = info.action - cut.head;
        const int hit = in_body < 0 ? -1 : in_body / V::kWidth - begin_of(cut.body);
        const int action = info.action;
        const float point = total.point, factor = -coefficient / total.raw_sum;
        const float at_target =
            info.chosen_z == -infinity()
                ? 0.0f
                : coefficient * (total.rest / total.total) * slope<CAPPED>(info.chosen_z, scale);
        const float slopeless = CAPPED ? factor : factor * scale.inverse;
        auto gradient = [&](float z) {
          const float e = exp2_fast(fmaf(capped<CAPPED>(z, scale), scale.factor, -point));
          return CAPPED ? slopeless * slope<CAPPED>(z, scale) * e : slopeless * e;
        };
        T* out = row_of<T>(gradients, info.index);
        uint4* out_vectors = reinterpret_cast<uint4*>(out + cut.head) + begin_of(cut.body);
        const int edge = rank == 0 && me < 32 ? cut.edge(lane) : -1;
        const float edge_z = edge >= 0 ? V::get(row + edge) : -infinity();
        const bool finite = fabsf(slopeless) < infinity();
        constexpr int kLoads = kStage / Shape::kClose;
        for (int c = 0; c < ring.chunks; ++c) {
          const int n = min(ring.chunk, mine - c * ring.chunk), target = hit - c * ring.chunk;
          uint4 x[kLoads];
#pragma unroll
          for (int u = 0; u < kLoads; ++u) {
            const int v = me + u * Shape::kClose;
            if (v < n) x[u] = stages[stage * kStage + v];
          }
          __syncwarp();
          if (lane == 0) barrier_arrive(shared_address(&empty[stage]));
          if (++stage == kStages) stage = 0;
          auto write = [&](auto value) {
#pragma unroll
            for (int u = 0; u < kLoads; ++u) {
              const int v = me + u * Shape::kClose;
              if (v >= n) continue;
              const uint32_t in[kWords] = {x[u].x, x[u].y, x[u].z, x[u].w};
              uint32_t w[kWords];
#pragma unroll
              for (int j = 0; j < kWords; ++j) {
                float z[kPer];
                V::unpack(in[j], z);
#pragma unroll
                for (int e = 0; e < kPer; ++e) z[e] = value(z[e]);
                w[j] = V::pack(z);
              }
              __stcs(out_vectors + c * ring.chunk + v, make_uint4(w[0], w[1], w[2], w[3]));
            }
          };
          if (finite)
            write(gradient);
          else  // a banned token keeps gradient 0, whatever the coefficient
            write([&](float z) { return z == -infinity() ? 0.0f : gradient(z); });
          // the chosen token's own element, by the thread that wrote its vector
          if (target >= 0 && target < n && target % Shape::kClose == me)
            V::put(out + action, at_target);
        }
        if (edge >= 0)
          V::put(out + edge, edge == action          ? at_target
                             : edge_z == -infinity() ? 0.0f
                                                     : gradient(edge_z));
      }
    }
    if (active_rows.list && rank == 0)  // inactive rows: what a row leaves behind is 0
      for (int64_t i = first + me * step; i < rows.count - active; i += Shape::kClose * step)
        op.inactive(active_rows.list[rows.count - 1 - i]);
  }
  if (CLUSTERED) cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace klq::cuda
