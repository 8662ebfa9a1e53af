// SPDX-License-Identifier: Apache-2.0
// One read (and, with a gradient, one write) of every row of logits, on Hopper and later: a row
// stays in shared memory between its sum and its gradient.
//
// Clusters of 1 to 8 blocks walk over the rows; each block holds a slice of the row. The
// warps of a block have roles, and no role ever waits for another's latencies:
//   - the producer keeps a ring of shared-memory stages full with bulk copies, across row borders,
//     and looks up what a row needs (its action and other inputs), 32 rows at a time;
//   - summers visit each stage once and leave one partial sum a warp and row;
//   - the closer merges the partial sums of all blocks of the cluster, always in the same order, so
//     that results are the same bits on every run, and finishes rows in double precision: eight at
//     once, a lane each, or one by one where a gradient waits for it;
//   - writers, for a gradient, visit the stages of a closed row again and write it, while the
//     summers are at the next row. Only then is a stage refilled.
// Sums meet in `slots`, one a row, used in turn. Rows take two stages or more, so the stages hold
// kRowsHeld rows at most. With a gradient a row holds its stages until it is written: no role gets
// more than kRowsHeld rows ahead of a later one of its block, nor 2 kRowsHeld + 1 of another's.
// Without, the producer is as near to the summers, who wait until row - kSlots / 2 is `closed`.
#pragma once
#include "cuda/hopper.cuh"
#include "cuda/ring_shape.cuh"
#include "cuda/row_sums.cuh"

namespace klq::cuda {

template <class T, bool CAPPED, class Op, bool CLUSTERED, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, blocks_asked(Shape::kBlocks))
    row_ring_kernel(const Rows rows, const Rows ref, const Rows gradients,
                    const ActiveRows active_rows, const Ring ring, const Scale scale, const Op op) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  using V = Vec<T>;
  constexpr bool kRef = Op::kRef, kGrad = Op::kGrad;
  using Sum = Sums<kRef, Op::kMoments>;
  static_assert(!kGrad || (!kRef && Sum::kFloats == 2));  // a stage a chunk; a pair a warp
  static_assert(kGrad ? Shape::kWrite > 0 : !CLUSTERED && Shape::kWrite == 0);
  static_assert(kGrad ? 2 * Shape::kRowsHeld + 2 <= kSlots
                      : Shape::kRowsHeld + kSlots / 2 + 2 <= kSlots);
  constexpr int kStages = Shape::kStages, U = Shape::kUnroll, kPitch = Shape::kPitch;
  constexpr int kSummers = Shape::kSum / 32, kWriters = Shape::kWrite / 32;
  constexpr int kPairs = kSummers * (CLUSTERED ? 8 : 1), kWords = 4, kPer = V::kPer;
  constexpr int kRows = 1 + kRef;  // stages a chunk takes
  extern __shared__ __align__(128) uint4 stages[];
  __shared__ __align__(8) uint64_t full[kStages], empty[kStages], ready[kSlots], closed[kSlots];
  __shared__ __align__(16) float partial[kSlots][kPairs][Sum::kFloats];
  __shared__ RowInfo<Op> infos[kSlots];
  __shared__ RowGradient gradients_of[kGrad ? kSlots : 1];

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int cluster = CLUSTERED ? ring.cluster : 1, pairs = kSummers * cluster;
  const int rank = CLUSTERED ? int(cluster_rank()) : 0;
  const int64_t first = blockIdx.x / cluster, step = gridDim.x / cluster;
  const int width = int(rows.width);
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), kWarpArrivals * (kGrad ? kWriters : kSummers));
    }
    for (int i = 0; i < kSlots; ++i) {
      // in a cluster the sums come as bytes that the barrier counts, from every block
      barrier_init(shared_address(&ready[i]), CLUSTERED ? 1 : kSummers);
      barrier_init(shared_address(&closed[i]), kWarpArrivals);
      if (CLUSTERED) barrier_expect(shared_address(&ready[i]), 8 * pairs);
    }
    barrier_fence_init();
  }
  if (CLUSTERED)
    cluster_sync();
  else
    __syncthreads();

  const int64_t active = active_rows.list ? int64_t(*active_rows.active) : rows.count;
  // this block's units of a row, and its columns in a chunk of them
  constexpr int kWidth = V::kWidth, kFull = Shape::kStage * kWidth;  // columns of a whole chunk
  const int all = (width + kWidth - 1) / kWidth,
            begin = CLUSTERED ? min(all, ring.slice * rank) : 0;
  const int mine = CLUSTERED ? min(ring.slice, all - begin) : all;
  auto first_column = [&](int c) { return (begin + c * Shape::kStage) * kWidth; };
  auto columns = [&](int c) {
    const int units = max(0, min(Shape::kStage, mine - c * Shape::kStage));
    return min(units * kWidth, max(0, width - first_column(c)));
  };

  if (warp == kSummers + kWriters + 1) {
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
        info.row = reinterpret_cast<const char*>(row);
        info.ref = reinterpret_cast<const char*>(ref_row);
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
          uint32_t stage = done % kStages, phase = done / kStages;
          for (int c = 0; c < ring.chunks; ++c) {
            const int bytes = columns(c) * int(sizeof(T));
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
              const char* row = k ? info.ref : info.row;
              const int shift = shift_of(row);
              // whole 16 bytes, up to 15 more on either side, but never past the end of the row:
              // what does not fill the last 16 is put there by hand
              const int whole = (shift + bytes + 15) / 16 * 16;
              const int64_t left = int64_t(width - first_column(c)) * int64_t(sizeof(T)) + shift;
              const bool cut = bytes && whole > left;
              const int aligned = !bytes ? 0 : cut ? int(left) / 16 * 16 : whole;
              const uint32_t bar = shared_address(&full[stage]);
              const uint32_t to = shared_address(stages + stage * kPitch + lead_of(row));
              barrier_wait(shared_address(&empty[stage]), (phase & 1) ^ 1);
              if (c == 0 && k == 0) infos[slot] = info;  // who read the slot before is past it
              if (cut)
                store_before_copies(to + aligned, row_end(reinterpret_cast<const T*>(row) + width));
              barrier_expect(bar, aligned);
              if (aligned)
                bulk_load(to, row - shift + int64_t(first_column(c)) * int64_t(sizeof(T)), aligned,
                          bar, kGrad && ring.keep);
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
    // a warp's units of a chunk are neighbours, so that the last chunk leaves whole warps idle
    constexpr int kUnits = 32 * U;  // of a chunk, for a warp
    const uint32_t held = opaque(shared_address(stages + warp * kUnits + lane));
    for (int64_t i = first; i < active; i += step) {
      barrier_wait(shared_address(&full[stage]), phase);  // infos[slot] was written before it
      const RowInfo<Op>& info = infos[slot];
      const int shifts[2] = {shift_of(info.row), kRef ? shift_of(info.ref) : 0};
      const int leads[2] = {lead_of(info.row), kRef ? lead_of(info.ref) : 0};
      // the chosen token's unit, from this warp's first of the chunk at hand
      int target = info.action < 0 ? -1 : info.action / kWidth - begin - warp * kUnits;
      const int hit_element = info.action & (kWidth - 1);
      Sum sum;
      float point = 0.0f, ref_point = 0.0f;
      bool huge = false;
      const bool aligned = (shifts[0] | shifts[1]) == 0;
      // columns from there to the end
      int left = min(mine * kWidth, width - begin * kWidth) - warp * kUnits * kWidth;
      for (int c = 0; c < ring.chunks; ++c, left -= kFull, target -= Shape::kStage) {
        const bool whole = left >= kUnits * kWidth && unsigned(target) >= unsigned(kUnits);
        uint32_t w[kRows][U][kWords], top[kRows];
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          barrier_wait(shared_address(&full[stage]), phase);
          const uint32_t from = held + (stage * kPitch + leads[k]) * 16;
          // all loads at once, without a branch: what lies past the end is dropped below
          uint4 x[U];
#pragma unroll
          for (int u = 0; u < U; ++u)
            if (aligned) x[u] = load_shared(from + u * 512);
          if (!aligned) {
#pragma unroll
            for (int u = 0; u < U; ++u) x[u] = load_shifted(from + u * 512, shifts[k]);
          }
#pragma unroll
          for (int u = 0; u < U; ++u)
            w[k][u][0] = x[u].x, w[k][u][1] = x[u].y, w[k][u][2] = x[u].z, w[k][u][3] = x[u].w;
          if (!whole) {
#pragma unroll
            for (int u = 0; u < U; ++u) {
              const int v = lane + u * 32, there = left - v * kWidth;
              if (v == target) {
#pragma unroll
                for (int j = 0; j < kWords; ++j)
                  w[k][u][j] = V::drop(w[k][u][j], hit_element - j * kPer);
              }
              if (there < kWidth) {
#pragma unroll
                for (int j = 0; j < kWords; ++j)
                  w[k][u][j] = V::drop_from(w[k][u][j], there - j * kPer);
              }
            }
          }
          top[k] = w[k][0][0];
#pragma unroll
          for (int j = 1; j < U * kWords; ++j)
            top[k] = V::max(top[k], w[k][j / kWords][j % kWords]);
          if (!kGrad) warp_arrive(shared_address(&empty[stage]), lane);
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
        if (left <= 0) continue;  // the row ended before this warp's units
        if (sum.make_room(capped<CAPPED>(V::top(top[0]), scale),
                          kRef ? capped<CAPPED>(V::top(top[kRows - 1]), scale) : 0.0f, scale)) {
          point = scale.point(sum.max), ref_point = scale.point(sum.ref_max);
          huge = scale.huge(sum.max) || (kRef && scale.huge(sum.ref_max));
        }
        constexpr int kParts = 2;  // chains of additions
        Sum parts[kParts];
        auto add = [&](auto exponent) {
#pragma unroll
          for (int u = 0; u < U; ++u) {
#pragma unroll
            for (int j = 0; j < kWords; ++j) {
              float z[kPer], zr[kPer];
              V::unpack(w[0][u][j], z);
              if (kRef) V::unpack(w[kRows - 1][u][j], zr);
#pragma unroll
              for (int e = 0; e < kPer; ++e)
                parts[(j * kPer + e) % kParts].add(
                    exponent(capped<CAPPED>(z[e], scale), sum.max, point),
                    kRef ? exponent(capped<CAPPED>(zr[e], scale), sum.ref_max, ref_point) : 0.0f);
            }
          }
        };
        if (huge)
          add([&](float y, float max, float here) { return scale.exponent(y, max, here); });
        else
          add([&](float y, float, float here) { return fmaf(y, scale.factor, -here); });
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          sum.sum += parts[p].sum, sum.plain += parts[p].plain;
          sum.ref_sum += parts[p].ref_sum, sum.cross += parts[p].cross;
        }
      }
      sum.see(info.chosen, info.ref_chosen);  // in the maximum, not in the sum
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
        T* out = row_of<T>(gradients, active_rows.list[rows.count - 1 - i]) + begin * kWidth;
        const Cut<T> cut(out, min(mine * kWidth, width - begin * kWidth));
        uint4* to = reinterpret_cast<uint4*>(out + cut.head);
        for (int v = thread; v < cut.body; v += Shape::kSum) __stcs(to + v, make_uint4(0, 0, 0, 0));
        const int edge = warp == 0 ? cut.edge(lane) : -1;
        if (edge >= 0) V::put(out + edge, 0.0f);
      }
    }
  } else if (warp == kSummers + kWriters) {
    // --- closer
    const int who = rank == 0 ? lane : Shape::kThreads;  // 0: the thread that writes for the row
    constexpr int kBatch = kGrad ? 1 : 8;
    uint32_t stage = 0, phase = 0, parity = 0;
    int slot = 0, gathered = 0;
    Sum mine;  // lane j keeps the j-th row of a batch
    RowInfo<Op> my_info;
    my_info.index = -1;
    for (int64_t i = first; i < active; i += step) {
      const uint32_t bar = shared_address(&ready[slot]);
      barrier_wait<CLUSTERED>(bar, parity);
      if (CLUSTERED) {
        // what other blocks sent says nothing of this block's `infos` and copies
        barrier_wait(shared_address(&full[stage]), phase);
        stage += ring.chunks;
        if (stage >= kStages) stage -= kStages, phase ^= 1;
      }
      Sum sum;
      if (lane < pairs) sum.load(partial[slot][lane]);
      if (kPairs > 32 && lane + 32 < pairs) {
        Sum other;
        other.load(partial[slot][lane + 32]);
        sum.merge(other, scale);
      }
      sum.merge_warp(scale);
      if (kGrad || lane == gathered) mine = sum, my_info = infos[slot];
      if (CLUSTERED && lane == 0) barrier_expect(bar, 8 * pairs);  // for the slot's next row
      auto finish = [&](int who) {
        const RowSum row(mine.max, mine.sum, my_info.chosen, scale);
        const float c = op.finish(my_info, mine, row, scale, who);
        return RowGradient{row.max, row.point, -c / row.raw_sum,
                           row.template chosen_gradient<CAPPED>(c, my_info.chosen_z, scale)};
      };
      if constexpr (kGrad) {
        const RowGradient found = finish(who);
        if (lane == 0) gradients_of[slot] = found;
      }
      warp_arrive(shared_address(&closed[slot]), lane);
      // the last rows one by one: a scan may wait for them
      if (!kGrad && (++gathered == kBatch || i + kBatch * step >= active)) {
        finish(lane < gathered ? 0 : 1);
        gathered = 0;
      }
      if (++slot == kSlots) slot = 0, parity ^= 1;
    }
    if (active_rows.list && rank == 0) {  // inactive rows: what a row leaves behind is 0
      const int64_t rest = rows.count - active;
      for (int64_t i = first; i < rest; i += 32 * step) {
        const int64_t there = i + lane * step;
        op.inactive(there < rest ? active_rows.list[rows.count - 1 - there] : -1);
      }
    }
  } else if constexpr (kGrad) {
    // --- writers
    const int me = thread - Shape::kSum;
    uint32_t stage = 0, phase = 0, parity = 0;
    int slot = 0;
    for (int64_t i = first; i < active; i += step) {
      barrier_wait(shared_address(&closed[slot]), parity);
      const RowInfo<Op>& info = infos[slot];
      const RowGradient found = gradients_of[slot];
      if (++slot == kSlots) slot = 0, parity ^= 1;
      const int action = info.action, shift = shift_of(info.row), lead = lead_of(info.row);
      const float scaled_factor = found.factor * scale.inverse;
      auto gradient = [&](float z) {
        return scaled_factor * exp2_fast(fmaf(z, scale.factor, -found.point));
      };
      // a token of probability 0 keeps gradient 0, whatever the coefficient
      auto careful = [&](float z) {
        const float e = exp2_fast(scale.exponent(capped<CAPPED>(z, scale), found.max, found.point));
        return e == 0.0f ? 0.0f : found.factor * slope<CAPPED>(z, scale) * e;
      };
      const bool ordinary = !CAPPED && fabsf(scaled_factor) < infinity() && !scale.huge(found.max);
      T* out_row = row_of<T>(gradients, info.index);
      constexpr int kLoads = Shape::kStage / Shape::kWrite;
      for (int c = 0; c < ring.chunks; ++c) {
        // vectors as the gradient's addresses have them; the row's may lie otherwise
        const int first = first_column(c);
        T* out = out_row + first;
        const Cut<T> cut(out, columns(c));
        const uint4* held = stages + stage * kPitch + lead;
        const uint32_t from = shared_address(held + me);
        if (CLUSTERED) barrier_wait(shared_address(&full[stage]), phase);
        const int at = shift + cut.head * int(sizeof(T));
        const int edge = me < 32 ? cut.edge(lane) : -1;
        const char* read = reinterpret_cast<const char*>(held) + shift;
        const float edge_z = edge >= 0 ? V::get(reinterpret_cast<const T*>(read) + edge) : 0.0f;
        uint4* vectors = reinterpret_cast<uint4*>(out + cut.head);
        uint4 x[kLoads];
#pragma unroll
        for (int u = 0; u < kLoads; ++u)
          if (at == 0) x[u] = load_shared(from + u * Shape::kWrite * 16);
        if (at != 0) {
#pragma unroll
          for (int u = 0; u < kLoads; ++u)
            if (me + u * Shape::kWrite < cut.body)
              x[u] = load_shifted(from + (at / 16 + u * Shape::kWrite) * 16, at & 15);
        }
        warp_arrive(shared_address(&empty[stage]), lane);
        auto write = [&](auto value) {
#pragma unroll
          for (int u = 0; u < kLoads; ++u) {
            const int v = me + u * Shape::kWrite;
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
            if (v < cut.body) vectors[v] = make_uint4(w[0], w[1], w[2], w[3]);
          }
        };
        if (ordinary)
          write(gradient);
        else
          write(careful);
        if (++stage == kStages) stage = 0, phase ^= 1;
        if (edge >= 0) V::put(out + edge, first + edge == action ? found.chosen : careful(edge_z));
        // the chosen token's own element, by the thread that wrote its vector
        const int in_body = action - first - cut.head;
        if (action >= first && in_body >= 0 && in_body < cut.body * kWidth &&
            in_body / kWidth % Shape::kWrite == me)
          V::put(out_row + action, found.chosen);
      }
    }
  }
  __syncwarp();
  if (CLUSTERED) cluster_sync();  // no block leaves while another may still write to it
#endif
}

}  // namespace klq::cuda
