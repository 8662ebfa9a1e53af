// SPDX-License-Identifier: Apache-2.0
// What a row, or a row and the reference's, comes to: running sums and what is made of them.
//
// The chosen token's term stays out of the sums (`rest`), which keeps 1 - p exact when p is near 1,
// in the log-prob (log1p(rest)) and in the gradient (rest / sum).
#pragma once
#include "cuda/vec.cuh"

namespace klq::cuda {

// Over elements y (and ref), with t = y factor - point and u likewise for the reference:
// sum = sum 2^t, ref_sum = sum 2^u, and with MOMENTS plain = sum 2^t t, cross = sum 2^t (t - u).
template <bool REF, bool MOMENTS>
struct Sums {
  float max = -infinity(), sum = 0.0f;
  float ref_max = -infinity(), ref_sum = 0.0f;
  float plain = 0.0f, cross = 0.0f;
  float best = -infinity(), ref_best = -infinity();  // elements seen; max may lag behind
  static constexpr int kFloats = 2 + 2 * REF + (1 + REF) * MOMENTS;

  // what an exponent changes by when the maximum moves
  static __device__ __forceinline__ float shift(float from, float to, const Scale& s) {
    if (from == -infinity()) return 0.0f;  // there were no terms
    return (from - to) * s.factor - (s.excess(from) - s.excess(to));
  }
  // moves the reference points up to what is now the largest element; whether they moved
  __device__ __forceinline__ bool raise(float to, float ref_to, const Scale& s) {
    const bool up = to > max, ref_up = REF && ref_to > ref_max;
    if (!up && !ref_up) return false;
    const float by = up ? shift(max, to, s) : 0.0f;
    const float ref_by = ref_up ? shift(ref_max, ref_to, s) : 0.0f;
    const float f = !up ? 1.0f : max == -infinity() ? 0.0f : exp2_fast(by);
    // by may be -inf where f is 0; a NaN among the terms still shows in their sum
    if (MOMENTS) plain = f > 0.0f ? f * fmaf(by, sum, plain) : 0.0f;
    // one step for both, so that a model and itself differ by exactly 0
    if (MOMENTS && REF) cross = f > 0.0f && sum > 0.0f ? f * fmaf(by - ref_by, sum, cross) : 0.0f;
    sum *= f;
    max = up ? to : max;
    if (ref_up) {
      ref_sum *= ref_max == -infinity() ? 0.0f : exp2_fast(ref_by);
      ref_max = ref_to;
    }
    return true;
  }
  // Elements up to `top` may be added after it; whether the points moved. They move only for an
  // exponent above 8: were `max` the maximum at any time, then in a short row nearly every step of
  // a warp would move some lane's, which took a tenth of the forward (H200, 2026-11-22).
  __device__ __forceinline__ bool make_room(float top, float ref_top, const Scale& s) {
    see(top, ref_top);
    const bool far = top > max + s.slack || (REF && ref_top > ref_max + s.slack);
    return far && raise(top, ref_top, s);
  }
  __device__ __forceinline__ void see(float y, float ref) {
    best = fmaxf(best, y);
    if (REF) ref_best = fmaxf(ref_best, ref);
  }
  // t and u are exponents at the present points
  __device__ __forceinline__ void add(float t, float u) {
    const float e = exp2_fast(t);
    sum += e;
    if (REF) ref_sum += exp2_fast(u);
    if (MOMENTS && e > 0.0f) {  // else 0 * -inf
      plain = fmaf(e, t, plain);
      if (REF) cross = fmaf(e, t - u, cross);
    }
  }
  // N elements y of each row
  template <int N, int R>
  __device__ __forceinline__ void add(const float (&y)[N], const float (&ref)[R], const Scale& s) {
    float top = -infinity(), ref_top = -infinity();
#pragma unroll
    for (int e = 0; e < N; ++e) {
      top = fmaxf(top, y[e]);
      if (REF) ref_top = fmaxf(ref_top, ref[e]);
    }
    make_room(top, ref_top, s);
    const float here = s.point(max), ref_here = s.point(ref_max);
#pragma unroll
    for (int e = 0; e < N; ++e)
      add(s.exponent(y[e], max, here), REF ? s.exponent(ref[e], ref_max, ref_here) : 0.0f);
  }
  // over the 32 lanes of a warp, at the maximum; every lane gets the same bits
  __device__ __forceinline__ void merge_warp(const Scale& s) {
    float top = fmaxf(max, best), ref_top = fmaxf(ref_max, ref_best);
#pragma unroll
    for (int o = 16; o; o /= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
      if (REF) ref_top = fmaxf(ref_top, __shfl_xor_sync(~0u, ref_top, o));
    }
    raise(top, ref_top, s);
#pragma unroll
    for (int o = 16; o; o /= 2) {
      sum += __shfl_xor_sync(~0u, sum, o);
      if (REF) ref_sum += __shfl_xor_sync(~0u, ref_sum, o);
      if (MOMENTS) plain += __shfl_xor_sync(~0u, plain, o);
      if (MOMENTS && REF) cross += __shfl_xor_sync(~0u, cross, o);
    }
  }
  __device__ __forceinline__ void merge(const Sums& other, const Scale& s) {
    Sums x = other;
    x.raise(max, ref_max, s);
    raise(x.max, x.ref_max, s);
    sum += x.sum;
    if (REF) ref_sum += x.ref_sum;
    if (MOMENTS) plain += x.plain;
    if (MOMENTS && REF) cross += x.cross;
  }
  __device__ __forceinline__ void store(float* to) const {
    to[0] = max, to[1] = sum;
    if (REF) to[2] = ref_max, to[3] = ref_sum;
    if (MOMENTS) to[2 + 2 * REF] = plain;
    if (MOMENTS && REF) to[5] = cross;
  }
  __device__ __forceinline__ void load(const float* from) {
    max = from[0], sum = from[1];
    if (REF) ref_max = from[2], ref_sum = from[3];
    if (MOMENTS) plain = from[2 + 2 * REF];
    if (MOMENTS && REF) cross = from[5];
  }
};

// One row: p_j = 2^exponent(y_j) / raw_sum.
struct RowSum {
  float max, chosen;    // y
  float rest;           // sum over the others of e^((y - max) / T)
  float point, excess;  // and what its rounding left out, max factor - point
  float raw_sum;        // sum of all terms at `point`
  double log_sum;       // log of the sum of all e^((y - max) / T)
  double logprob;
  double other;  // 1 - p of the chosen token

  // chosen is y of the action, -inf where it is none of the row's columns
  __device__ RowSum(float max_, float raw_rest, float chosen_, const Scale& s)
      : max(max_), chosen(chosen_) {
    point = s.point(max);
    excess = s.excess(max);
    const double x = chosen == max ? 0.0 : (double(chosen) - double(max)) / s.temperature;
    const double others = double(raw_rest) * (1.0 - 0.693147180559945309 * double(excess));
    const double all = others + double(expf(float(x)));
    rest = float(others), other = others / all;
    raw_sum = float(all) * exp2f(excess);
    log_sum = chosen == max && others < 0.5 ? double(log1pf(rest)) : log(all);
    logprob = x - log_sum;
    if (logprob > 0) logprob = 0;
    if (!(fabsf(max) < infinity())) logprob = double(not_a_number());
  }
  // The gradient at the chosen token, whose logit is z: rounded once, for it is most often the
  // row's largest.
  template <bool CAPPED>
  __device__ float chosen_gradient(float coefficient, float z, const Scale& s) const {
    if (z == -infinity()) return 0.0f;
    double slope = 1.0 / s.temperature;
    if (CAPPED) {
      const double h = tanh(double(z) / double(s.softcap));
      slope *= 1.0 - h * h;
    }
    return float(double(coefficient) * other * slope);
  }
};

// An op is what is done with a row's sums:
//   action(r), load(r)   what it needs to know of row r before
//   finish(info, sums, row, scale, who)   by whole warps, the first of which counts `who` from 0;
//       writes where that is 0, which in a ring without a gradient several lanes are, each for a
//       row of its own; returns the coefficient of the gradient
//   inactive(r)          for rows that are not read, by a warp at a time; -1 where a lane has none
// What is known of a row before it is read:
template <class Op>
struct RowInfo {
  const char *row, *ref;
  float chosen, ref_chosen;  // y of the action; -inf where it is none of the columns
  float chosen_z;
  int action;  // -1 where it is none of the columns
  int index;
  typename Op::Inputs inputs;
};

// H = log S - sum p (z' - max'), and KL = sum p ((z' - max') - (z_b' - max_b')) - log S + log S_b
template <bool REF>
__device__ inline void moments(const Sums<REF, true>& sums, const RowSum& row, const RowSum& ref,
                               const Scale& s, float* entropy, float* kl) {
  constexpr float kLn2 = 0.693147180559945309f;
  const float t = s.exponent(row.chosen, row.max, row.point), e = exp2_fast(t);
  const float mean = (sums.plain + e * fmaxf(t, -16384.0f)) / row.raw_sum;
  *entropy = float(row.log_sum) - (mean - row.excess) * kLn2;
  if (!(fabsf(row.max) < infinity())) *entropy = not_a_number();
  if (!REF) return;
  const float u = s.exponent(ref.chosen, ref.max, ref.point);
  const float cross = (sums.cross + (e > 0.0f ? e * (t - u) : 0.0f)) / row.raw_sum;
  *kl = (cross - (row.excess - ref.excess)) * kLn2 - float(row.log_sum - ref.log_sum);
  if (!(fabsf(row.max) < infinity() && fabsf(ref.max) < infinity())) *kl = not_a_number();
}

}  // namespace klq::cuda
