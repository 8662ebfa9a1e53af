// SPDX-License-Identifier: Apache-2.0
// Reverse scan of eq. (7) in its W form, W_t = V_t + c_t A_t and A_t = (r_t - Q_t) + gamma W_next,
// over one range of tokens by one group of threads: part of a warp, a warp, or a block.
//
// A lane holds four neighbouring tokens (one 16-byte load an input), runs them right to left in
// float32, and describes them to the others as an affine map W = d + f W_next in double, which
// keeps (gamma lambda)^n exact at any length. Maps are composed by shuffles and, across warps, in
// shared memory, always in the same order: the same bits on every run.
// A factor of zero cuts: nothing from its right enters, not even a NaN.
#pragma once
#include <cuda_fp16.h>

#include "cuda/lambda_returns.h"

namespace klq::cuda {

constexpr int kLaneTokens = 4;

struct ScanMap {
  double d, f;
};
__device__ inline double through(ScanMap m, double w) { return m.f == 0 ? m.d : fma(m.f, w, m.d); }
__device__ inline ScanMap compose(ScanMap left, ScanMap right) {
  if (left.f == 0) return left;
  return {fma(left.f, right.d, left.d), left.f * right.f};
}

// Threads that scan one range together: a block of kWarps, or (kWarps = 0) `threads` <= 32
// neighbouring lanes, whose warp must take part as a whole.
template <int kWarps>
struct Group {
  int threads, rank;
  ScanMap (*shared)[kWarps ? kWarps : 1] = nullptr;  // [2], used in turn: one barrier a turn

  __device__ int width() const { return kWarps ? 32 : threads; }
  // m becomes the map of this lane and what lies right of it in its warp; returns that of the
  // latter
  __device__ ScanMap suffix(ScanMap& m) const {
    const int lane = rank % width();
#pragma unroll
    for (int step = 1; step < (kWarps ? 32 : width()); step *= 2) {
      const ScanMap right{__shfl_down_sync(~0u, m.d, step, width()),
                          __shfl_down_sync(~0u, m.f, step, width())};
      if (lane + step < width()) m = compose(m, right);
    }
    const ScanMap after{__shfl_down_sync(~0u, m.d, 1, width()),
                        __shfl_down_sync(~0u, m.f, 1, width())};
    return lane == width() - 1 ? ScanMap{0, 1} : after;
  }

  // The W that enters each lane, whose map is m, when `carry` enters the group. `carry` becomes the
  // W that leaves the group.
  __device__ double enter(ScanMap m, int turn, double& carry) const {
    const ScanMap after = suffix(m);
    double w = carry;
    if constexpr (kWarps == 0) {
      carry = through({__shfl_sync(~0u, m.d, 0, width()), __shfl_sync(~0u, m.f, 0, width())}, w);
    } else {
      const int warp = int(threadIdx.x) / 32;
      ScanMap* maps = shared[turn % 2];
      if (threadIdx.x % 32 == 0) maps[warp] = m;
      __syncthreads();
      double left = carry;
#pragma unroll
      for (int j = kWarps - 1; j >= 0; --j) {
        if (j == warp) w = left;
        left = through(maps[j], left);
      }
      carry = left;
    }
    return through(after, w);
  }

  // The map of a whole block.
  __device__ ScanMap total(ScanMap m, int turn) const {
    suffix(m);
    ScanMap* maps = shared[turn % 2];
    if (threadIdx.x % 32 == 0) maps[threadIdx.x / 32] = m;
    __syncthreads();
    ScanMap all{0, 1};
#pragma unroll
    for (int j = kWarps - 1; j >= 0; --j) all = compose(maps[j], all);
    return all;
  }
};

// The sequence a token is in; walks right to left over packed ends or rows of one length.
struct Cursor {
  const Sequences& seqs;
  int64_t index = seqs.count, begin = INT64_MAX, end = INT64_MAX;

  __device__ explicit Cursor(const Sequences& s) : seqs(s) {}
  __device__ int64_t bound(int64_t i) const {
    if (!seqs.ends) return i * seqs.length;
    return seqs.wide_ends ? static_cast<const int64_t*>(seqs.ends)[i]
                          : static_cast<const int32_t*>(seqs.ends)[i];
  }
  // Whether t, which never grows, is in a sequence; that is then [begin, end). Unchecked ends lead
  // to wrong sequences, never out of the buffers.
  __device__ bool seek(int64_t t) {
    if (seqs.count == 0) return false;
    if (t < begin && !seqs.ends) {
      index = t / seqs.length;
      begin = index * seqs.length, end = begin + seqs.length;
    } else if (t < begin) {
      // the last i with bound(i) <= t: most often the one before, else not far
      int64_t high = index, low = max(index - 1, int64_t(0)), value = bound(low);
      for (int64_t step = 2; value > t && low > 0; step *= 2) {
        high = low, low = max(low - step, int64_t(0)), value = bound(low);
      }
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2, there = bound(middle);
        if (there <= t) {
          low = middle, value = there;
        } else {
          high = middle;
        }
      }
      index = low, begin = value, end = bound(low + 1);
    }
    return t >= begin && t < end;
  }
  // The same for a token anywhere, by a whole warp: three dependent loads find one of 32 000 ends,
  // where bisection takes fifteen.
  __device__ bool seek_far(int64_t t) {
    if (!seqs.ends || seqs.count == 0) return seek(t);
    int64_t low = 0, high = seqs.count;
    while (high - low > 1) {
      const int64_t step = (high - low + 31) / 32, i = low + threadIdx.x % 32 * step;
      const unsigned before = __ballot_sync(~0u, i < high && bound(i) <= t) | 1;
      low += (__popc(before) - 1) * step;
      high = min(high, low + step);
    }
    index = low, begin = bound(low), end = bound(low + 1);
    return t >= begin && t < end;
  }
};

__device__ inline float widen(uint32_t bits, Type type) {
  if (type == Type::f32) return __uint_as_float(bits);
  return type == Type::bf16 ? __uint_as_float(bits << 16)
                            : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
// The L2-coherent loads also see what this launch wrote (klq_targets' log-ratios).
__device__ inline float load(const Reals& x, int64_t i) {
  return widen(x.type == Type::f32 ? __ldcg(static_cast<const unsigned int*>(x.data) + i)
                                   : __ldcg(static_cast<const unsigned short*>(x.data) + i),
               x.type);
}

// Tokens t .. t + 3 as they lie in memory, so that waiting for them is left to their first use.
struct Raw {
  uint32_t word[kLaneTokens];
};
__device__ inline Raw load_floats(const void* data, int64_t t) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(static_cast<const float*>(data) + t));
  return {{v.x, v.y, v.z, v.w}};
}
// Those from `low` to before `high`. kPlain: known to be all four, float32 and aligned.
template <bool kPlain>
__device__ Raw load_raw(const Reals& x, int64_t t, int low, int high) {
  if constexpr (kPlain) {
    return load_floats(x.data, t);
  } else {
    Raw raw{};
    const bool whole = x.vector && high - low == kLaneTokens;
    if (x.type == Type::f32) {
      if (whole) return load_floats(x.data, t);
      for (int k = 0; k < kLaneTokens; ++k)
        if (k >= low && k < high)
          raw.word[k] = __ldcg(static_cast<const unsigned int*>(x.data) + t + k);
    } else {
      const unsigned short* from = static_cast<const unsigned short*>(x.data) + t;
      if (whole) {
        const uint2 v = __ldcg(reinterpret_cast<const uint2*>(from));
        return {{v.x, v.y}};
      }
      for (int k = 0; k < kLaneTokens; ++k)
        if (k >= low && k < high) raw.word[k / 2] |= uint32_t(__ldcg(from + k)) << (k % 2 * 16);
    }
    return raw;
  }
}
template <bool kPlain>
__device__ float at(const Raw& raw, int k, Type type) {
  return kPlain || type == Type::f32 ? __uint_as_float(raw.word[k])
                                     : widen(raw.word[k / 2] >> (k % 2 * 16) & 0xffff, type);
}

struct RawTokens {
  Raw log_ratio, value, reward, trace;
  uint32_t mask;  // a byte a token
};
// What lies outside [begin, end) is inactive and not read: another block may be writing it.
template <bool kPlain>
__device__ RawTokens load_tokens(const ScanArgs& s, int64_t t, int64_t begin, int64_t end) {
  RawTokens x{};
  if (t + kLaneTokens <= begin || t >= end) return x;
  const int low = int(max(begin - t, int64_t(0))), high = int(min(end - t, int64_t(kLaneTokens)));
  const bool whole = high - low == kLaneTokens;
  if (kPlain && !whole) {
    for (int k = 0; k < kLaneTokens; ++k) {
      const int64_t i = min(max(t + k, begin), end - 1);
      x.value.word[k] = __ldcg(static_cast<const unsigned int*>(s.values.data) + i);
      x.reward.word[k] = __ldcg(static_cast<const unsigned int*>(s.rewards.data) + i);
      if (s.log_ratios.data)
        x.log_ratio.word[k] = __ldcg(static_cast<const unsigned int*>(s.log_ratios.data) + i);
      x.mask |= uint32_t(s.mask ? __ldcg(s.mask + i) : 1) << (8 * k);
    }
    return x;
  }
  x.value = load_raw<kPlain>(s.values, t, low, high);
  x.reward = load_raw<kPlain>(s.rewards, t, low, high);
  if (s.log_ratios.data) x.log_ratio = load_raw<kPlain>(s.log_ratios, t, low, high);
  if (!kPlain && s.trace.data) x.trace = load_raw<kPlain>(s.trace, t, low, high);
  x.mask = 0x01010101;
  if (s.mask && (kPlain || (s.mask_vector && whole))) {
    x.mask = __ldcg(reinterpret_cast<const unsigned int*>(s.mask + t));
  } else if (s.mask) {
    x.mask = 0;
    for (int k = 0; k < kLaneTokens; ++k)
      if (k >= low && k < high) x.mask |= uint32_t(__ldcg(s.mask + t + k)) << (8 * k);
  }
  return x;
}

__device__ inline void store(float* to, const float (&x)[kLaneTokens], int64_t t, int64_t begin,
                             int64_t end, bool vector) {
  if (vector && t >= begin && t + kLaneTokens <= end) {
    *reinterpret_cast<float4*>(to + t) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
  for (int k = 0; k < kLaneTokens; ++k)
    if (t + k >= begin && t + k < end) to[t + k] = x[k];
}

// Chunks of a range of `length` tokens that begins anywhere; the same for all groups of a warp.
__host__ __device__ inline int chunks_of(int64_t length, int threads) {
  const int64_t size = int64_t(threads) * kLaneTokens;
  return int((length + (length % kLaneTokens ? kLaneTokens - 1 : 0) + size - 1) / size);
}

// Chunks that cover [begin, end), for groups of whole warps.
__device__ inline int chunks_between(int64_t begin, int64_t end, int threads) {
  const int64_t size = int64_t(threads) * kLaneTokens;
  return int(((end + kLaneTokens - 1) / kLaneTokens * kLaneTokens - begin + size - 1) / size);
}

// A lane's tokens, ready for the recursion.
struct Lane {
  float q[kLaneTokens], u[kLaneTokens], v[kLaneTokens], c[kLaneTokens], seed[kLaneTokens];
  uint32_t active, last;  // a bit a token; last: `seed` is the W that follows it

  // A of token k; w goes from the W right of it to its own.
  __device__ float step(int k, float gamma, float& w) const {
    if (last >> k & 1) w = seed[k];
    if (!(active >> k & 1)) return 0.0f;
    const float a = gamma == 0 ? u[k] : fmaf(gamma, w, u[k]);
    w = c[k] == 0 ? v[k] : fmaf(c[k], a, v[k]);
    return a;
  }
};

// What a scan begins with: the trace decay, and the W of what follows its tokens.
struct Start {
  double lam, carry;
  Cursor cursor;  // where to look for sequences from; kEnds only
};

// Scans the tokens [begin, end) from what `start()` gives, which is asked while their loads are
// under way; returns their map.
// kPlain: float32 inputs aligned for vectors, one trace decay for all. kWrite: fills the outputs
// there. kEnds: sequences end inside, each with its own bootstrap and lam; otherwise the range lies
// in one sequence, whose trace decay is that of `start`.
template <bool kPlain, bool kEnds, bool kWrite, class Members, class Begin>
__device__ ScanMap scan_range(const ScanArgs& s, const Members& group, int64_t begin, int64_t end,
                              int chunks, const Begin& start) {
  const float tau = float(s.tau), gamma = float(s.gamma), alpha = float(s.alpha);
  const bool traced = !kPlain && s.trace.data;
  const bool own_lam = !kPlain && kEnds && !traced && s.lam_rows.data;
  const int64_t chunk = int64_t(group.threads) * kLaneTokens;
  // lanes begin at multiples of four tokens of the whole tensor, so that vectors are aligned
  int64_t t = (end + kLaneTokens - 1) / kLaneTokens * kLaneTokens - chunk +
              int64_t(group.rank) * kLaneTokens;
  ScanMap whole{0, 1};
  RawTokens next = load_tokens<kPlain>(s, t, begin, end);
  auto [lam, carry, cursor] = start();
  const double decay = float(lam) == 0 ? 0.0 : s.gamma * lam;

  for (int i = 0; i < chunks; ++i, t -= chunk) {
    const RawTokens x = next;
    if (i + 1 < chunks) next = load_tokens<kPlain>(s, t - chunk, begin, end);

    Lane lane{};
    float w = 0;
    double f = 1;
#pragma unroll
    for (int k = kLaneTokens - 1; k >= 0; --k) {
      lane.c[k] = traced ? at<kPlain>(x.trace, k, s.trace.type) : float(lam);
      bool use = t + k >= begin && t + k < end;
      if constexpr (kEnds) {
        use = use && cursor.seek(t + k);
        if (use && t + k + 1 == cursor.end) {
          lane.last |= 1u << k;
          lane.seed[k] = s.bootstrap.data ? load(s.bootstrap, cursor.index) : 0.0f;
          f = 0;
        }
        if (use && own_lam) lane.c[k] = load(s.lam_rows, cursor.index);
      }
      use = use && (x.mask >> (8 * k) & 0xff);
      lane.active |= uint32_t(use) << k;
      lane.v[k] = at<kPlain>(x.value, k, s.values.type);
      lane.q[k] = s.log_ratios.data
                      ? fmaf(tau, at<kPlain>(x.log_ratio, k, s.log_ratios.type), lane.v[k])
                      : lane.v[k];
      lane.u[k] = at<kPlain>(x.reward, k, s.rewards.type) - lane.q[k];
      lane.step(k, gamma, w);
      if (!kPlain && use) {
        const double factor = traced || own_lam ? double(lane.c[k]) * s.gamma : decay;
        f = factor == 0 ? 0.0 : f * factor;
      } else if (use) {
        f *= decay;
      }
    }

    const ScanMap map{double(w), f};
    if constexpr (!kWrite) {
      whole = compose(group.total(map, i), whole);
    } else {
      w = float(group.enter(map, i, carry));
      float a[kLaneTokens], g[kLaneTokens];
#pragma unroll
      for (int k = kLaneTokens - 1; k >= 0; --k) {
        const bool use = lane.active >> k & 1;
        a[k] = lane.step(k, gamma, w);
        g[k] = use ? fmaf(alpha, a[k], lane.q[k]) : 0.0f;
        lane.q[k] = use ? lane.q[k] : 0.0f;
      }
      if (t + kLaneTokens <= begin || t >= end) continue;
      if (s.q) store(s.q, lane.q, t, begin, end, kPlain || s.outputs_vector);
      store(s.advantages, a, t, begin, end, kPlain || s.outputs_vector);
      store(s.returns, g, t, begin, end, kPlain || s.outputs_vector);
    }
  }
  return whole;
}

// The sequence [begin, end), from its bootstrap, by one group. Other kernels may call it for what
// they wrote themselves, once that is visible: inputs are never read through the read-only path.
//   const Group<0> warp{32, int(threadIdx.x) % 32};
//   scan_sequence<true>(s, warp, sequence, begin, end, chunks_between(begin, end, 32));
template <bool kPlain, class Members>
__device__ void scan_sequence(const ScanArgs& s, const Members& group, int64_t sequence,
                              int64_t begin, int64_t end, int chunks) {
  const bool there = sequence < s.seqs.count;
  scan_range<kPlain, false, true>(s, group, begin, there ? end : begin, chunks, [&] {
    return Start{there && s.lam_rows.data ? double(load(s.lam_rows, sequence)) : s.lam,
                 there && s.bootstrap.data ? double(load(s.bootstrap, sequence)) : 0.0,
                 Cursor(s.seqs)};
  });
}

}  // namespace klq::cuda
