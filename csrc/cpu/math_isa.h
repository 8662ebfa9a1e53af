// SPDX-License-Identifier: Apache-2.0
// One instruction set's float table, written with the compilers' vector types. math.cpp includes
// this file once per instruction set, inside a namespace and under the matching target pragma, with
// KLQ_LANES set; it is no ordinary header and has no include guard.

typedef float F __attribute__((vector_size(4 * KLQ_LANES), aligned(4)));
typedef int32_t I __attribute__((vector_size(4 * KLQ_LANES), aligned(4)));
typedef uint32_t U __attribute__((vector_size(4 * KLQ_LANES), aligned(4)));
typedef uint16_t H __attribute__((vector_size(2 * KLQ_LANES), aligned(2)));
constexpr int64_t L = KLQ_LANES;

static inline F splat(float x) { return F{} + x; }
static inline F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
static inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }

// exp on (-inf, 0], to about 1 ulp: 2^k * e^r with |r| <= ln2 / 2. Below -87.3 the result is 0;
// NaN stays NaN (every comparison with it is false, so it takes the arithmetic branch).
static inline F exp_negative(F x) {
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  F shifted = x * 1.44269504088896341f + magic;
  F k = shifted - magic;
  F r = x - k * 0.693145751953125f;
  r = r - k * 1.42860682030941723212e-6f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  U bits = ((U)shifted - (U)magic + 127) << 23;
  F y = p * (F)bits;
  return x < splat(-87.3f) ? F{} : y;
}

// tanh by a polynomial near 0 and by exp elsewhere, so that small arguments keep their digits
static inline F tanh_all(F x) {
  F a = x < F{} ? -x : x;
  F e = exp_negative(a * -2.0f);
  F large = (1.0f - e) / (1.0f + e);
  large = x < F{} ? -large : large;
  F z = x * x;
  F p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  F small = p * z * x + x;
  return a < splat(0.625f) ? small : large;  // NaN: the second
}

static inline float sum_lanes(F x) {
  float lanes[L], total = 0;
  store(lanes, x);
  for (int64_t i = 0; i < L; ++i) total += lanes[i];
  return total;
}

// The last n < L elements, the missing ones filled with `fill`.
static inline F load_tail(const float* p, int64_t n, float fill) {
  float lanes[L];
  for (int64_t i = 0; i < L; ++i) lanes[i] = i < n ? p[i] : fill;
  return load(lanes);
}
static inline void store_tail(float* p, F x, int64_t n) {
  float lanes[L];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

static inline F half_to_float(H h) {
  U w = __builtin_convertvector(h, U);
  U magnitude = w & 0x7fff;
  U bits = magnitude << 13;
  F f = (F)bits * (F)(U{} + 0x77800000u);  // times 2^112: exponent bias, subnormals included
  U special = (U)f | 0x7f800000u;
  U value = magnitude >= 0x7c00 ? special : (U)f;
  return (F)(value | ((w & 0x8000) << 16));
}
static inline H float_to_half(F x) {
  U bits = (U)x, sign = bits & 0x80000000u;
  U a = bits ^ sign;
  F tiny = (F)a + (F)(U{} + 0x3f000000u);  // + 0.5: the adder rounds to the subnormal grid
  U subnormal = (U)tiny - 0x3f000000u;
  U normal = (a + 0xc8000fffu + ((a >> 13) & 1)) >> 13;
  U finite = a < 0x38800000u ? subnormal : normal;
  U special = a > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  U half = a >= 0x477ff000u ? special : finite;
  return __builtin_convertvector(half | (sign >> 16), H);
}
static inline F bfloat_to_float(H h) { return (F)(__builtin_convertvector(h, U) << 16); }
static inline H float_to_bfloat(F x) {
  U bits = (U)x;
  U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  U quiet = (bits >> 16) | 0x40;
  U nan = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  return __builtin_convertvector(nan, H);
}

template <F (*convert)(H)>
static void read16(const uint16_t* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    H h;
    __builtin_memcpy(&h, in + i, sizeof h);
    store(out + i, convert(h));
  }
  if (i < n) {
    H h{};
    __builtin_memcpy(&h, in + i, 2 * (n - i));
    store_tail(out + i, convert(h), n - i);
  }
}
template <H (*convert)(F)>
static void write16(const float* in, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    H h = convert(load(in + i));
    __builtin_memcpy(out + i, &h, sizeof h);
  }
  if (i < n) {
    H h = convert(load_tail(in + i, n - i, 0));
    __builtin_memcpy(out + i, &h, 2 * (n - i));
  }
}

static void read(Type type, const void* in, float* out, int64_t n) {
  if (type == Type::bf16) return read16<bfloat_to_float>((const uint16_t*)in, out, n);
  if (type == Type::f16) return read16<half_to_float>((const uint16_t*)in, out, n);
  __builtin_memcpy(out, in, 4 * n);
}
static void write(Type type, const float* in, void* out, int64_t n) {
  if (type == Type::bf16) return write16<float_to_bfloat>(in, (uint16_t*)out, n);
  if (type == Type::f16) return write16<float_to_half>(in, (uint16_t*)out, n);
  __builtin_memcpy(out, in, 4 * n);
}

template <class Body>
static inline __attribute__((always_inline)) void map(const float* x, float* out, int64_t n,
                                                      float fill, Body body) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, body(load(x + i)));
  if (i < n) store_tail(out + i, body(load_tail(x + i, n - i, fill)), n - i);
}

static void scale(float* x, int64_t n, Scaling s) {
  const F t = splat(s.temperature), c = splat(s.softcap ? s.softcap : 1);
  const F minus_inf = splat(-INFINITY);
  if (s.softcap) {
    map(x, x, n, 0, [=](F z) {
      F y = c * tanh_all(z / c) / t;
      return z == minus_inf ? z : y;
    });
  } else {
    map(x, x, n, 0, [=](F z) { return z / t; });
  }
}

// From the logit itself: 1 - tanh^2 of a rounded tanh would lose the digits of a saturated slope.
static void slope(const float* logit, float* product, int64_t n, Scaling s) {
  const F c = splat(s.softcap), t = splat(s.temperature);
  auto times_slope = [=](F z, F y) {
    F x = z / c, e = exp_negative((x < F{} ? x : -x) * 2.0f), d = 1.0f + e;
    return y * (4.0f * e / (d * d) / t);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) store(product + i, times_slope(load(logit + i), load(product + i)));
  if (i < n)
    store_tail(product + i,
               times_slope(load_tail(logit + i, n - i, 0), load_tail(product + i, n - i, 0)),
               n - i);
}

static float max(const float* x, int64_t n) {
  F m = splat(-INFINITY), m2 = m;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    F a = load(x + i), b = load(x + i + L);
    m = a > m ? a : m;
    m2 = b > m2 ? b : m2;
  }
  for (; i < n; i += L) {
    F a = i + L <= n ? load(x + i) : load_tail(x + i, n - i, -INFINITY);
    m = a > m ? a : m;
  }
  m = m2 > m ? m2 : m;
  float lanes[L], top = -INFINITY;
  store(lanes, m);
  for (int64_t j = 0; j < L; ++j) top = lanes[j] > top ? lanes[j] : top;
  return top;
}

// Sums of `term` over a block: four vectors of partial sums, at most kBlock / (4 L) terms each.
template <class Term>
static inline __attribute__((always_inline)) double sum(const float* x, const float* y, int64_t n,
                                                        Term term) {
  F s[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int64_t j = 0; j < 4; ++j) s[j] += term(load(x + i + j * L), load(y + i + j * L));
  for (; i + L <= n; i += L) s[0] += term(load(x + i), load(y + i));
  if (i < n) s[1] += term(load_tail(x + i, n - i, -INFINITY), load_tail(y + i, n - i, -INFINITY));
  return sum_lanes((s[0] + s[1]) + (s[2] + s[3]));
}

static double sum_exp(const float* x, int64_t n, float m) {
  const F top = splat(m);
  return sum(x, x, n, [=](F a, F) { return exp_negative(a - top); });
}
static double sum_exp_x(const float* x, int64_t n, float m) {
  const F top = splat(m);
  return sum(x, x, n, [=](F a, F) {
    F d = a - top, e = exp_negative(d), p = e * d;
    return e == F{} ? F{} : p;
  });
}
static double sum_exp_diff(const float* x, const float* y, int64_t n, float m, float my) {
  const F top = splat(m), top_y = splat(my);
  return sum(x, y, n, [=](F a, F b) {
    F d = a - top, e = exp_negative(d), p = e * (d - (b - top_y));
    return e == F{} ? F{} : p;
  });
}
static void exp_times(const float* x, float* out, int64_t n, float m, float a) {
  const F top = splat(m), minus_inf = splat(-INFINITY);
  map(x, out, n, -INFINITY, [=](F z) {
    F y = exp_negative(z - top) * a;
    return z == minus_inf ? F{} : y;  // select: a may be infinite
  });
}

template <class Body>
static inline __attribute__((always_inline)) void map2(const float* x, const float* y, float* out,
                                                       int64_t n, Body body) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(out + i, body(load(x + i), load(y + i)));
  if (i < n)
    store_tail(out + i, body(load_tail(x + i, n - i, 0), load_tail(y + i, n - i, 0)), n - i);
}

static void scaled_diff(const float* x, const float* y, float* out, int64_t n, float m, float my,
                        float c, float a, float b) {
  const F minus_inf = splat(-INFINITY);
  map2(x, y, out, n, [=](F u, F w) {
    F q = (((u - m) - (w - my)) - c) * a + b;
    return u == minus_inf ? u : q;
  });
}
static void tilt(const float* x, const float* y, float* out, int64_t n, float my, float a) {
  const F minus_inf = splat(-INFINITY);
  map2(x, y, out, n, [=](F u, F w) {
    F sum = (w - my) + u * a;
    sum = u == minus_inf ? u : sum;
    return w == minus_inf ? w : sum;
  });
}

static const Math<float> table = {read,      write,        scale,     slope,       max, sum_exp,
                                  sum_exp_x, sum_exp_diff, exp_times, scaled_diff, tilt};
