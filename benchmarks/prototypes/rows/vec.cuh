// SPDX-License-Identifier: Apache-2.0
// Sixteen bytes of logits as floats, and the exponential arithmetic of a row.
//
// e^(z' - max) is formed as 2^fma(z', log2(e), -M) with M = fl(max * log2(e)), the same M for every
// term of the row, so that the rounding of M cancels in every ratio: one multiply-add and one
// special-function instruction a term, also for logits around 1000.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace klq::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class T>
struct Vec;  // kWidth elements in a uint4

template <>
struct Vec<float> {
  static constexpr int kWidth = 4;
  static constexpr uint32_t kMinusInf = 0xff800000u;
  static __device__ __forceinline__ float one(const float* p) { return *p; }
  static __device__ __forceinline__ void put(float* p, float x) { *p = x; }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ float top(uint32_t w) { return __uint_as_float(w); }
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) { x[0] = __uint_as_float(w); }
  static __device__ __forceinline__ uint32_t pack(const float* x) { return __float_as_uint(x[0]); }
  static __device__ __forceinline__ uint32_t drop(uint32_t, int) { return kMinusInf; }
};

template <>
struct Vec<bf16> {
  static constexpr int kWidth = 8;
  static constexpr uint32_t kMinusInf = 0xff80ff80u;
  static __device__ __forceinline__ float one(const bf16* p) {
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
  static __device__ __forceinline__ uint32_t drop(uint32_t w, int j) {
    return j & 1 ? (w & 0xffffu) | 0xff800000u : (w & 0xffff0000u) | 0xff80u;
  }
};

template <>
struct Vec<f16> {
  static constexpr int kWidth = 8;
  static constexpr uint32_t kMinusInf = 0xfc00fc00u;
  static __device__ __forceinline__ float one(const f16* p) {
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
  static __device__ __forceinline__ uint32_t drop(uint32_t w, int j) {
    return j & 1 ? (w & 0xffffu) | 0xfc000000u : (w & 0xffff0000u) | 0xfc00u;
  }
};

constexpr float kLog2e = 1.44269504088896340736f;

// z' = softcap * tanh(z / softcap) / temperature
struct Scale {
  float temperature, inverse;  // inverse = 1 / temperature
  float softcap, inv_cap;      // 0: none
};

// tanh with small relative error everywhere: by a polynomial near 0, by exp2 elsewhere
__device__ __forceinline__ float tanh_accurate(float x) {
  const float a = fabsf(x), z = x * x;
  float p = -5.70498872745e-3f;
  p = fmaf(p, z, 2.06390887954e-2f);
  p = fmaf(p, z, -5.37397155531e-2f);
  p = fmaf(p, z, 1.33314422036e-1f);
  p = fmaf(p, z, -3.33332819422e-1f);
  const float small = fmaf(p * z, x, x);
  const float e = exp2_fast(a * -2.88539008177792681f);
  const float large = copysignf((1.0f - e) / (1.0f + e), x);
  return a < 0.625f ? small : large;
}

// SCALED is false for temperature 1 without a soft-cap, where z' = z costs nothing.
template <bool SCALED>
__device__ __forceinline__ float scaled(float z, const Scale& s) {
  if (!SCALED) return z;
  const float y = s.softcap > 0.0f ? s.softcap * tanh_accurate(z * s.inv_cap) : z;
  const float q = y * s.inverse;  // one Newton step makes it the rounded quotient
  return z == minus_infinity() ? z : fmaf(fmaf(-q, s.temperature, y), s.inverse, q);
}

// dz'/dz
template <bool SCALED>
__device__ __forceinline__ float slope(float z, const Scale& s) {
  if (!SCALED) return 1.0f;
  if (s.softcap == 0.0f) return s.inverse;
  const float h = tanh_accurate(z * s.inv_cap);
  return z == minus_infinity() ? 0.0f : (1.0f - h * h) * s.inverse;
}

// 2^(z' log2(e) - point), with point = fl(max * log2(e))
__device__ __forceinline__ float exp_from(float z, float point) {
  return exp2_fast(fmaf(z, kLog2e, -point));
}

// Running (max, sum of e^(z' - max)) over elements, and the merge of two of them.
struct Online {
  float max = minus_infinity(), sum = 0.0f;

  // factor that brings a sum at `from` to the reference point `to` >= from
  static __device__ __forceinline__ float rescale(float from, float to) {
    return from == minus_infinity() ? 0.0f : exp2_fast(from * kLog2e - to * kLog2e);
  }
  __device__ __forceinline__ void raise(float to) {
    if (to > max) {
      sum *= rescale(max, to);
      max = to;
    }
  }
  // never -inf, whose difference with -inf would be NaN
  __device__ __forceinline__ float point() const {
    return max == minus_infinity() ? 0.0f : max * kLog2e;
  }

  __device__ __forceinline__ void merge(float m, float s) {
    const float to = fmaxf(max, m);
    sum = sum * rescale(max, to) + s * rescale(m, to);
    max = to;
  }
  // over the 32 lanes of a warp; every lane gets the same bits
  __device__ __forceinline__ void merge_warp() {
    float top = max;
    for (int o = 16; o; o /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    sum *= rescale(max, top);
    max = top;
    for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  }
};

}  // namespace klq::cuda
