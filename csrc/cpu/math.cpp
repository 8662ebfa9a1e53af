// SPDX-License-Identifier: Apache-2.0
// Instantiates the float table once per instruction set and picks one at load time.
#include "cpu/math.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

namespace klq {

namespace baseline {
#define KLQ_LANES 4
#include "cpu/math_isa.h"
#undef KLQ_LANES
}  // namespace baseline

#ifdef KLQ_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define KLQ_LANES 8
#include "cpu/math_isa.h"
#undef KLQ_LANES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#define KLQ_LANES 16
#include "cpu/math_isa.h"
#undef KLQ_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

namespace portable {  // double

static void read(Type type, const void* in, double* out, int64_t n) {
  if (type == Type::f64) {
    std::memcpy(out, in, 8 * n);
    return;
  }
  float narrow[kBlock];
  baseline::read(type, in, narrow, n);
  for (int64_t i = 0; i < n; ++i) out[i] = narrow[i];
}
static void write(Type type, const double* in, void* out, int64_t n) {
  if (type == Type::f64) {
    std::memcpy(out, in, 8 * n);
    return;
  }
  float narrow[kBlock];
  for (int64_t i = 0; i < n; ++i) narrow[i] = in[i];
  baseline::write(type, narrow, out, n);
}
static void scale(double* x, int64_t n, Scaling s) {
  for (int64_t i = 0; i < n; ++i) {
    double capped = s.softcap ? s.softcap * std::tanh(x[i] / s.softcap) : x[i];
    x[i] = (x[i] == -INFINITY ? x[i] : capped) / s.temperature;
  }
}
static void slope(const double* logit, double* product, int64_t n, Scaling s) {
  for (int64_t i = 0; i < n; ++i) {
    const double e = std::exp(-2 * std::abs(logit[i] / s.softcap)), d = 1 + e;
    product[i] *= 4 * e / (d * d) / s.temperature;
  }
}
static double max(const double* x, int64_t n) {
  double m = -INFINITY;
  for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
static double sum_exp(const double* x, int64_t n, double m) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) s += std::exp(x[i] - m);
  return s;
}
static double sum_exp_x(const double* x, int64_t n, double m) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) {
    double e = std::exp(x[i] - m);
    s += e == 0 ? 0.0 : e * (x[i] - m);
  }
  return s;
}
static double sum_exp_diff(const double* x, const double* y, int64_t n, double m, double my) {
  double s = 0;
  for (int64_t i = 0; i < n; ++i) {
    double e = std::exp(x[i] - m);
    s += e == 0 ? 0.0 : e * ((x[i] - m) - (y[i] - my));
  }
  return s;
}
static void exp_times(const double* x, double* out, int64_t n, double m, double a) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] == -INFINITY ? 0.0 : a * std::exp(x[i] - m);
}
static void scaled_diff(const double* x, const double* y, double* out, int64_t n, double m,
                        double my, double c, double a, double b) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = x[i] == -INFINITY ? x[i] : (((x[i] - m) - (y[i] - my)) - c) * a + b;
}
static void tilt(const double* x, const double* y, double* out, int64_t n, double my, double a) {
  for (int64_t i = 0; i < n; ++i)
    out[i] = x[i] == -INFINITY || y[i] == -INFINITY ? -INFINITY : (y[i] - my) + x[i] * a;
}
static const Math<double> table = {read,      write,        scale,     slope,       max, sum_exp,
                                   sum_exp_x, sum_exp_diff, exp_times, scaled_diff, tilt};

}  // namespace portable

Isa isa() {
  static const Isa best = [] {
#ifdef KLQ_X86_TARGETS
    __builtin_cpu_init();
    const char* limit = std::getenv("KLQ_CPU_ISA");
    const bool any = !limit || std::strcmp(limit, "avx512") == 0;
    const bool up_to_avx2 = any || std::strcmp(limit, "avx2") == 0;
    if (any && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if (up_to_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  return best;
}

const char* isa_name() {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[int(isa())];
}

template <>
const Math<float>& math<float>() {
#ifdef KLQ_X86_TARGETS
  if (isa() == Isa::avx512) return avx512::table;
  if (isa() == Isa::avx2) return avx2::table;
#endif
  return baseline::table;
}
template <>
const Math<double>& math<double>() {
  return portable::table;
}

}  // namespace klq
