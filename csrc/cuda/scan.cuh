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
constexpr int kMaxWarps = 8;

struct ScanMap {
  double d, f;
};
__device__ inline double through(ScanMap m, double w) { return m.f == 0 ? m.d : fma(m.f, w, m.d); }
__device__ inline ScanMap compose(ScanMap left, ScanMap right) {
  if (left.f == 0) return left;
  return {fma(left.f, right.d, left.d), left.f * right.f};
}

// Threads that scan one range together. kBlock: all warps of the block; else `threads` <= 32
// neighbouring lanes, whose warp must take part as a whole.
template <bool kBlock>
struct Group {
  int threads, rank;
  ScanMap (*shared)[kMaxWarps];  // [2], used in turn; kBlock only

  // Composes the lanes' maps. Gives the map of what lies right of this lane in its warp (`after`),
  // and calls visit(j, map) for the group's warps j from right to left.
  template <class Visit>
  __device__ void compose_all(ScanMap m, int turn, ScanMap& after, const Visit& visit) const {
    const int width = kBlock ? 32 : threads, lane = rank % width;
    for (int step = 1; step < width; step *= 2) {
      const ScanMap right{__shfl_down_sync(~0u, m.d, step, width),
                          __shfl_down_sync(~0u, m.f, step, width)};
      if (lane + step < width) m = compose(m, right);
    }
    after = {__shfl_down_sync(~0u, m.d, 1, width), __shfl_down_sync(~0u, m.f, 1, width)};
    if (lane == width - 1) after = {0, 1};
    if constexpr (kBlock) {
      ScanMap* maps = shared[turn % 2];
      if (lane == 0) maps[rank / 32] = m;
      __syncthreads();
      for (int j = threads / 32 - 1; j >= 0; --j) visit(j, maps[j]);
    } else {
      visit(0, ScanMap{__shfl_sync(~0u, m.d, 0, width), __shfl_sync(~0u, m.f, 0, width)});
    }
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
  // Whether t is in a sequence, which is then [begin, end). Unchecked ends lead to wrong sequences,
  // never out of the buffers.
  __device__ bool seek(int64_t t) {
    if (seqs.count == 0) return false;
    if (t < begin || (t >= end && index + 1 < seqs.count)) {
      if (!seqs.ends) {
        index = t / seqs.length;
        begin = index * seqs.length, end = begin + seqs.length;
        return true;
      }
      // the last i with bound(i) <= t: most often the one before, else by bisection
      int64_t low = 0, high = t < begin ? max(index, int64_t(1)) : seqs.count;
      if (bound(high - 1) <= t) low = high - 1;
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (bound(middle) <= t ? low : high) = middle;
      }
      index = low, begin = bound(low), end = bound(low + 1);
    }
    return t >= begin && t < end;
  }
};

__device__ inline float widen(uint32_t bits, Real type) {
  if (type == Real::f32) return __uint_as_float(bits);
  return type == Real::bf16 ? __uint_as_float(bits << 16)
                            : __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
// The L2-coherent loads also see what this launch wrote (klq_targets' log-ratios).
__device__ inline float load(const Reals& x, int64_t i) {
  return widen(x.type == Real::f32 ? __ldcg(static_cast<const unsigned int*>(x.data) + i)
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
// The first `count` of them. kPlain: known to be all four, float32 and aligned.
template <bool kPlain>
__device__ Raw load_raw(const Reals& x, int64_t t, int count) {
  if constexpr (kPlain) {
    return load_floats(x.data, t);
  } else {
    Raw raw{};
    const bool whole = x.vector && count == kLaneTokens;
    if (x.type == Real::f32) {
      if (whole) return load_floats(x.data, t);
      for (int k = 0; k < kLaneTokens; ++k)
        if (k < count) raw.word[k] = __ldcg(static_cast<const unsigned int*>(x.data) + t + k);
    } else {
      const unsigned short* from = static_cast<const unsigned short*>(x.data) + t;
      if (whole) {
        const uint2 v = __ldcg(reinterpret_cast<const uint2*>(from));
        return {{v.x, v.y}};
      }
      for (int k = 0; k < kLaneTokens; ++k)
        if (k < count) raw.word[k / 2] |= uint32_t(__ldcg(from + k)) << (k % 2 * 16);
    }
    return raw;
  }
}
template <bool kPlain>
__device__ float at(const Raw& raw, int k, Real type) {
  return kPlain || type == Real::f32 ? __uint_as_float(raw.word[k])
                                     : widen(raw.word[k / 2] >> (k % 2 * 16) & 0xffff, type);
}

struct RawTokens {
  Raw log_ratio, value, reward, trace;
  uint32_t mask;  // a byte a token
};
// What lies outside [begin, end) may be read with its neighbours but is inactive.
template <bool kPlain>
__device__ RawTokens load_tokens(const ScanArgs& s, int64_t t, int64_t begin, int64_t end) {
  RawTokens x{};
  if (t + kLaneTokens <= begin || t >= end) return x;
  const int count = int(min(s.seqs.tokens - t, int64_t(kLaneTokens)));
  if constexpr (kPlain) {
    if (count < kLaneTokens) return load_tokens<false>(s, t, begin, end);
  }
  x.value = load_raw<kPlain>(s.values, t, count);
  x.reward = load_raw<kPlain>(s.rewards, t, count);
  if (s.log_ratios.data) x.log_ratio = load_raw<kPlain>(s.log_ratios, t, count);
  if (!kPlain && s.trace.data) x.trace = load_raw<kPlain>(s.trace, t, count);
  x.mask = 0x01010101;
  if (s.mask && (kPlain || (s.mask_vector && count == kLaneTokens))) {
    x.mask = __ldcg(reinterpret_cast<const unsigned int*>(s.mask + t));
  } else if (s.mask) {
    x.mask = 0;
    for (int k = 0; k < kLaneTokens; ++k)
      if (k < count) x.mask |= uint32_t(__ldcg(s.mask + t + k)) << (8 * k);
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
};

// Scans the tokens [begin, end) from what `start()` gives, which is asked while their loads are
// under way; returns their map.
// kPlain: float32 inputs aligned for vectors, one trace decay for all. kWrite: fills the outputs
// there. kEnds: sequences end inside, each with its own bootstrap and lam; otherwise the range lies
// in one sequence, whose trace decay is that of `start`.
template <bool kPlain, bool kEnds, bool kWrite, bool kBlock, class Begin>
__device__ ScanMap scan_range(const ScanArgs& s, const Group<kBlock>& group, int64_t begin,
                              int64_t end, int chunks, const Begin& start) {
  const float tau = float(s.tau), gamma = float(s.gamma), alpha = float(s.alpha);
  const bool traced = !kPlain && s.trace.data;
  const bool own_lam = !kPlain && kEnds && !traced && s.lam_rows.data;
  const int64_t chunk = int64_t(group.threads) * kLaneTokens;
  // lanes begin at multiples of four tokens of the whole tensor, so that vectors are aligned
  int64_t t = (end + kLaneTokens - 1) / kLaneTokens * kLaneTokens - chunk +
              int64_t(group.rank) * kLaneTokens;
  ScanMap whole{0, 1};
  Cursor cursor(s.seqs);
  RawTokens next = load_tokens<kPlain>(s, t, begin, end);
  auto [lam, carry] = start();
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
      const double factor = traced || own_lam ? double(lane.c[k]) * s.gamma : decay;
      if (use) f = factor == 0 ? 0.0 : f * factor;
    }

    ScanMap after;
    double right = carry;
    group.compose_all(ScanMap{double(w), f}, i % 2, after, [&](int j, ScanMap map) {
      if (!kBlock || j == group.rank / 32) right = carry;
      carry = through(map, carry);
      if (!kWrite) whole = compose(map, whole);
    });
    if constexpr (kWrite) {
      w = float(through(after, right));
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

// One sequence, from its bootstrap, by one group.
template <bool kPlain, bool kBlock>
__device__ void scan_sequence(const ScanArgs& s, const Group<kBlock>& group, int64_t sequence,
                              int64_t begin, int64_t end, int chunks) {
  const bool there = sequence < s.seqs.count;
  scan_range<kPlain, false, true>(s, group, begin, there ? end : begin, chunks, [&] {
    return Start{there && s.lam_rows.data ? double(load(s.lam_rows, sequence)) : s.lam,
                 there && s.bootstrap.data ? double(load(s.bootstrap, sequence)) : 0.0};
  });
}

}  // namespace klq::cuda
