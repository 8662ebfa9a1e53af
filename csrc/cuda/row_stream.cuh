// SPDX-License-Identifier: Apache-2.0
// The row kernel for every GPU and every layout: a warp or a block a row, the gradient from a
// second read (from L2 or L1, where the row still is).
//
// A row is read in units of 16 bytes from its first column on, wherever it lies, so that a row
// gives the same bits in any layout. `Vectors` is for rows of one type, `Elements` for two.
#pragma once
#include "cuda/row_sums.cuh"

namespace klq::cuda {

template <class T>
struct Vectors {
  using V = Vec<T>;
  static constexpr int kWidth = V::kWidth, kUnroll = 2;
  const T *row, *ref;
  T* out;
  int width;

  __device__ Vectors(const Rows& rows, const Rows* refs, const Rows* outs, int64_t r)
      : row(row_of<T>(rows, r)),
        ref(refs ? row_of<T>(*refs, r) : nullptr),
        out(outs ? row_of<T>(*outs, r) : nullptr),
        width(int(rows.width)) {}
  __device__ int units() const { return (width + kWidth - 1) / kWidth; }
  __device__ float get(int column) const { return V::get(row + column); }
  __device__ float get_ref(int column) const { return V::get(ref + column); }
  static __device__ bool vector(const T* from, int count) {
    return count >= kWidth && (reinterpret_cast<uintptr_t>(from) & 15) == 0;
  }
  static __device__ void read(const T* from, int count, float* z) {
    if (vector(from, count)) {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      const uint32_t w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) V::unpack(w[j], z + j * V::kPer);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) z[e] = e < count ? V::get(from + e) : -infinity();
    }
  }
  // a unit of the row; -inf past its end
  __device__ void load(int unit, float* z) const {
    read(row + unit * kWidth, width - unit * kWidth, z);
  }
  __device__ void load_ref(int unit, float* z) const {
    read(ref + unit * kWidth, width - unit * kWidth, z);
  }
  __device__ void store(int unit, const float* z) const {
    T* to = out + unit * kWidth;
    const int count = width - unit * kWidth;
    if (vector(to, count)) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = V::pack(z + j * V::kPer);
      __stcs(reinterpret_cast<uint4*>(to), make_uint4(w[0], w[1], w[2], w[3]));
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        if (e < count) V::put(to + e, z[e]);
    }
  }
};

struct Elements {
  static constexpr int kWidth = 1, kUnroll = 2;
  const Rows &rows, *refs, *outs;
  int64_t r;

  template <class Body>
  static __device__ void with(const Rows& x, int64_t r, const Body& body) {
    if (x.type == Type::f32) return body(row_of<float>(x, r));
    if (x.type == Type::bf16) return body(row_of<bf16>(x, r));
    body(row_of<f16>(x, r));
  }
  template <class T>
  static __device__ float one(const T* p) {
    return Vec<T>::get(p);
  }
  template <class T>
  static __device__ void one(T* p, float x) {
    Vec<T>::put(p, x);
  }
  static __device__ float read(const Rows& x, int64_t r, int column) {
    float z;
    with(x, r, [&](auto* row) { z = one(row + column); });
    return z;
  }

  __device__ Elements(const Rows& rows, const Rows* refs, const Rows* outs, int64_t r)
      : rows(rows), refs(refs), outs(outs), r(r) {}
  __device__ int units() const { return int(rows.width); }
  __device__ float get(int column) const { return read(rows, r, column); }
  __device__ float get_ref(int column) const { return read(*refs, r, column); }
  __device__ void load(int unit, float* z) const { *z = get(unit); }
  __device__ void load_ref(int unit, float* z) const { *z = get_ref(unit); }
  __device__ void store(int unit, const float* z) const {
    with(*outs, r, [&](auto* row) { one(row + unit, *z); });
  }
};

// Rows go to groups of LANES threads; blocks hold at least 128.
template <int LANES>
struct RowGroup {
  static constexpr int kWarps = LANES / 32, kThreads = LANES < 128 ? 128 : LANES;
  static constexpr int kTogether = kThreads / LANES;
  // blocks an SM, so that 80 registers are allowed, or 128
  static constexpr int blocks(bool heavy = false) { return (heavy ? 512 : 768) / kThreads; }
  int thread = threadIdx.x % LANES, warp = thread / 32, lane = thread % 32;
  int64_t first = int64_t(blockIdx.x) * kTogether + threadIdx.x / LANES;
  int64_t step = int64_t(gridDim.x) * kTogether;
  int turn = 0;
  __device__ void meet() const {
    if (LANES > 32)
      __syncthreads();
    else
      __syncwarp();
  }
};

// The sums of a row without the column `action`; `chosen` and `ref_chosen`, its y, count for the
// maximum only. Every thread of the group gets the same bits, after all have read the row.
template <bool REF, bool MOMENTS, bool CAPPED, int LANES, class Reader>
__device__ __forceinline__ Sums<REF, MOMENTS> sum_row(const Reader& in, int action, float chosen,
                                                      float ref_chosen, const Scale& scale,
                                                      RowGroup<LANES>& group) {
  using Sum = Sums<REF, MOMENTS>;
  constexpr int kWidth = Reader::kWidth, U = Reader::kUnroll;
  __shared__ float partial[2][RowGroup<LANES>::kWarps][Sum::kFloats];
  const int units = in.units();
  Sum sum;
  for (int base = group.thread; base < units; base += LANES * U) {
    float z[U * kWidth], zr[REF ? U * kWidth : 1];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int unit = base + u * LANES;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        z[u * kWidth + e] = -infinity();
        if (REF) zr[u * kWidth + e] = -infinity();
      }
      if (unit < units) {
        in.load(unit, z + u * kWidth);
        if constexpr (REF) in.load_ref(unit, zr + u * kWidth);
        const int hit = action - unit * kWidth;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          if (e == hit) z[u * kWidth + e] = -infinity();
          if (REF && e == hit) zr[u * kWidth + e] = -infinity();
        }
      }
    }
    if (CAPPED) {
#pragma unroll
      for (int e = 0; e < U * kWidth; ++e) {
        z[e] = capped<CAPPED>(z[e], scale);
        if (REF) zr[e] = capped<CAPPED>(zr[e], scale);
      }
    }
    sum.add(z, zr, scale);
  }
  sum.see(chosen, ref_chosen);
  sum.merge_warp(scale);
  if (LANES > 32) {
    if (group.lane == 0) sum.store(partial[group.turn][group.warp]);
    __syncthreads();
    sum = Sum();
    if (group.lane < RowGroup<LANES>::kWarps) sum.load(partial[group.turn][group.lane]);
    sum.merge_warp(scale);
    group.turn ^= 1;
  }
  return sum;
}

template <class Reader, int LANES>
__device__ void zero_row(const Rows& rows, const Rows& gradients, int64_t r,
                         const RowGroup<LANES>& group) {
  const Reader in(rows, nullptr, &gradients, r);
  const float zeros[Reader::kWidth] = {};
  for (int unit = group.thread; unit < in.units(); unit += LANES) in.store(unit, zeros);
}

// out[column] = value(row[column], column), several units in flight; out may be the row itself.
template <class Reader, int LANES, class Value>
__device__ __forceinline__ void write_row(const Reader& in, const RowGroup<LANES>& group,
                                          const Value& value) {
  constexpr int kWidth = Reader::kWidth, U = Reader::kUnroll;
  const int units = in.units();
  for (int base = group.thread; base < units; base += LANES * U) {
    float z[U * kWidth];
#pragma unroll
    for (int u = 0; u < U; ++u)
      if (base + u * LANES < units) in.load(base + u * LANES, z + u * kWidth);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int unit = base + u * LANES;
      if (unit >= units) continue;
#pragma unroll
      for (int e = 0; e < kWidth; ++e)
        z[u * kWidth + e] = value(z[u * kWidth + e], unit * kWidth + e);
      in.store(unit, z + u * kWidth);
    }
  }
}

template <class Reader, bool CAPPED, class Op, int LANES>
__global__ void __launch_bounds__(RowGroup<LANES>::kThreads, RowGroup<LANES>::blocks(Op::kHeavy))
    row_stream_kernel(const Rows rows, const Rows ref, const Rows gradients,
                      const ActiveRows active_rows, const Scale scale, const Op op) {
  constexpr bool kRef = Op::kRef, kGrad = Op::kGrad;
  RowGroup<LANES> group;
  const int thread = group.thread;
  const int64_t active = active_rows.list ? int64_t(*active_rows.active) : rows.count;

  for (int64_t i = group.first; i < active; i += group.step) {
    const int64_t r = active_rows.list ? active_rows.list[i] : i;
    const Reader in(rows, kRef ? &ref : nullptr, kGrad ? &gradients : nullptr, r);
    const int64_t wanted = op.action(r);
    const bool known = wanted >= 0 && wanted < rows.width;
    RowInfo<Op> info;
    const int action = info.action = known ? int(wanted) : -1;
    info.index = int(r);
    info.chosen_z = known ? in.get(action) : -infinity();
    info.chosen = capped<CAPPED>(info.chosen_z, scale);
    info.ref_chosen = kRef && known ? capped<CAPPED>(in.get_ref(action), scale) : -infinity();
    info.inputs = op.load(r);
    const auto sum =
        sum_row<kRef, Op::kMoments, CAPPED>(in, action, info.chosen, info.ref_chosen, scale, group);
    const RowSum total(sum.max, sum.sum, info.chosen, scale);
    const float coefficient = op.finish(info, sum, total, scale, thread);
    if constexpr (kGrad) {
      const float factor = -coefficient / total.raw_sum;
      const float at_target =
          total.template chosen_gradient<CAPPED>(coefficient, info.chosen_z, scale);
      auto gradient = [&](float z, int column) {
        if (column == action) return at_target;
        const float e = exp2_fast(scale.exponent(capped<CAPPED>(z, scale), total.max, total.point));
        return e == 0.0f ? 0.0f : factor * slope<CAPPED>(z, scale) * e;
      };
      write_row(in, group, gradient);
    }
  }
  if (!active_rows.list) return;
  for (int64_t i = group.first; i < rows.count - active; i += group.step) {
    const int64_t r = active_rows.list[rows.count - 1 - i];
    if (group.warp == 0) op.inactive(group.lane == 0 ? r : -1);
    if constexpr (kGrad) zero_row<Reader>(rows, gradients, r, group);
  }
}

}  // namespace klq::cuda
