// SPDX-License-Identifier: Apache-2.0
// Sixteen bytes of logits as floats, and the exponential arithmetic of a row.
//
// With y = c tanh(z / c) under a soft-cap, else z, a term e^((y - max) / T) is formed as
// 2^fma(y, log2(e) / T, -point), point = fl(max log2(e) / T) the same for every term of the row:
// one multiply-add and one special-function instruction, also for logits around 1000, and what the
// rounding of the point does to all terms alike is undone once a row (`RowSum`).
#pragma once
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/rows.h"

namespace klq::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
struct Vec;  // kWidth elements in a uint4, kPer of them in each of its four words

template <>
struct Vec<float> {
  static constexpr int kWidth = 4, kPer = 1;
  static constexpr uint32_t kMinusInf = 0xff800000u;
  static constexpr Type kType = Type::f32;
  static __device__ __forceinline__ float get(const float* p) { return *p; }
  static __device__ __forceinline__ void put(float* p, float x) { *p = x; }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ float top(uint32_t w) { return __uint_as_float(w); }
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) { x[0] = __uint_as_float(w); }
  static __device__ __forceinline__ uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
  // the word without its element e, if it has such a one
  static __device__ __forceinline__ uint32_t drop(uint32_t w, int e) {
    return e == 0 ? kMinusInf : w;
  }
  // the word without its elements from e on
  static __device__ __forceinline__ uint32_t drop_from(uint32_t w, int e) {
    return e <= 0 ? kMinusInf : w;
  }
};

template <>
struct Vec<bf16> {
  static constexpr int kWidth = 8, kPer = 2;
  static constexpr uint32_t kMinusInf = 0xff80ff80u;
  static constexpr Type kType = Type::bf16;
  static __device__ __forceinline__ float get(const bf16* p) {
    return __uint_as_float(uint32_t(p->bits) << 16);
  }
  static __device__ __forceinline__ void put(bf16* p, float x) {
    const float pair[2] = {x, x};
    p->bits = uint16_t(pack(pair));
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ float top(uint32_t w) {
    float x[2];
    unpack(w, x);
    return fmaxf(x[0], x[1]);
  }
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) {
    x[0] = __uint_as_float(w << 16);
    x[1] = __uint_as_float(w & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x[1]), "f"(x[0]));
    return r;
  }
  static __device__ __forceinline__ uint32_t drop(uint32_t w, int e) {
    w = e == 0 ? (w & 0xffff0000u) | 0xff80u : w;
    return e == 1 ? (w & 0xffffu) | 0xff800000u : w;
  }
  static __device__ __forceinline__ uint32_t drop_from(uint32_t w, int e) {
    return e <= 0 ? kMinusInf : drop(w, e);
  }
};

template <>
struct Vec<f16> {
  static constexpr int kWidth = 8, kPer = 2;
  static constexpr uint32_t kMinusInf = 0xfc00fc00u;
  static constexpr Type kType = Type::f16;
  static __device__ __forceinline__ float get(const f16* p) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(p->bits));
    return x;
  }
  static __device__ __forceinline__ void put(f16* p, float x) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(x));
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    uint32_t r;
    asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static __device__ __forceinline__ float top(uint32_t w) {
    float x[2];
    unpack(w, x);
    return fmaxf(x[0], x[1]);
  }
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) {
    asm("{\n.reg .f16 lo, hi;\nmov.b32 {lo, hi}, %2;\ncvt.f32.f16 %0, lo;\ncvt.f32.f16 %1, hi;\n}"
        : "=f"(x[0]), "=f"(x[1])
        : "r"(w));
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x[1]), "f"(x[0]));
    return r;
  }
  static __device__ __forceinline__ uint32_t drop(uint32_t w, int e) {
    w = e == 0 ? (w & 0xffff0000u) | 0xfc00u : w;
    return e == 1 ? (w & 0xffffu) | 0xfc000000u : w;
  }
  static __device__ __forceinline__ uint32_t drop_from(uint32_t w, int e) {
    return e <= 0 ? kMinusInf : drop(w, e);
  }
};

struct Scale {
  double temperature;
  float factor, inverse;   // log2(e) / T, 1 / T
  float slack;             // what is 8 in an exponent
  float softcap, inv_cap;  // 0: none

  Scale() = default;
  explicit Scale(Scaling s)
      : temperature(s.temperature),
        factor(float(1.44269504088896340736 / s.temperature)),
        inverse(float(1.0 / s.temperature)),
        slack(float(std::min(8.0 * s.temperature / 1.44269504088896340736, 1e38))),
        softcap(float(s.softcap)),
        inv_cap(s.softcap > 0 ? float(1.0 / s.softcap) : 0.0f) {}

  // z / softcap, rounded once: one Newton step after the product
  __device__ __forceinline__ float over_cap(float z) const {
    const float q = z * inv_cap, left = fmaf(-q, softcap, z);
    return fabsf(left) < infinity() ? fmaf(left, inv_cap, q) : q;
  }
  // Whether the rounding of a point would show; then differences are scaled, not products.
  __device__ __forceinline__ bool huge(float max) const {
    return fabsf(max) * factor > 16384.0f && fabsf(max) < infinity();
  }
  // Where exponents are reckoned from; never infinite below, where -inf - -inf would be NaN.
  __device__ __forceinline__ float point(float max) const {
    return max == -infinity() ? 0.0f : __fmul_rn(max, factor);
  }
  // what the rounding of the point left out
  __device__ __forceinline__ float excess(float max) const {
    return max == -infinity() || huge(max) ? 0.0f : fmaf(max, factor, -point(max));
  }
  // (y - max) log2(e) / T, whatever their size
  __device__ __forceinline__ float exponent(float y, float max, float point) const {
    return huge(max) ? (y - max) * factor : fmaf(y, factor, -point);
  }
};

// y of a logit; -inf stays -inf
template <bool CAPPED>
__device__ __forceinline__ float capped(float z, const Scale& s) {
  if (!CAPPED) return z;
  const float x = s.over_cap(z), square = x * x;
  // c tanh x = z + z (tanh(x) / x - 1): rounded nearly once, where the product with tanhf is off by
  // up to two units, which a temperature below 1 makes more of
  float p = -6.2824036e-3f;
  p = fmaf(p, square, 2.1077706e-2f), p = fmaf(p, square, -5.3853843e-2f);
  p = fmaf(p, square, 0.13332601f), p = fmaf(p, square, -0.33333319f);
  const float near = fmaf(z, p * square, z);
  // and further out as tanhf has it; both and a choice take fewer registers than a branch
  const float e = exp2_fast(2.88539008f * fabsf(x));
  const float far = s.softcap * copysignf(fmaf(-2.0f, reciprocal_fast(e + 1.0f), 1.0f), x);
  const float y = square > 0.3f ? far : near;
  return z == -infinity() ? z : y;
}

// dz'/dz at a logit: 1 - tanh^2, which cancels near 1, where it is 4 e / (1 + e)^2 of e = e^(-2|x|)
template <bool CAPPED>
__device__ __forceinline__ float slope(float z, const Scale& s) {
  if (!CAPPED) return s.inverse;
  if (z == -infinity()) return 0.0f;
  const float x = s.over_cap(z), h = tanhf(x);
  const float e = expf(-2.0f * fabsf(x)), d = 1.0f + e;
  return (fabsf(h) < 0.5f ? fmaf(-h, h, 1.0f) : 4.0f * e / (d * d)) * s.inverse;
}

// First element of row i. Rows are fewer than 2^31 (checked by the glue), which spares a 64-bit
// division: at 50304 columns four of those a row cost a quarter of the pass (H200, 2026-11-22).
template <class T>
__device__ __forceinline__ T* row_of(const Rows& r, int64_t i) {
  T* data = static_cast<T*>(r.data);
  if (r.inner >= r.count) return data + i * r.inner_stride;
  const uint32_t outer = uint32_t(i) / uint32_t(r.inner);
  return data + outer * r.outer_stride + (i - outer * r.inner) * r.inner_stride;
}

// `count` elements in 16-byte vectors; up to kWidth - 1 elements at either end are edges.
template <class T>
struct Cut {
  static constexpr int kWidth = Vec<T>::kWidth;
  int head, body, tail;  // elements, vectors, elements

  __device__ Cut(const T* from, int count) {
    const uint32_t misaligned = uint32_t(reinterpret_cast<uintptr_t>(from) & 15);
    head = min(misaligned ? int((16 - misaligned) / sizeof(T)) : 0, count);
    body = (count - head) / kWidth;
    tail = count - head - body * kWidth;
  }
  // index of edge element e (head first), or -1
  __device__ int edge(int e) const {
    if (e < head) return e;
    return e < head + tail ? body * kWidth + e : -1;
  }
};

}  // namespace klq::cuda
