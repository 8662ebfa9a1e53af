// SPDX-License-Identifier: Apache-2.0
// The arithmetic every row op is made of, on blocks of at most kBlock elements of float or double.
//
// One table of functions per instruction set, chosen once at run time (AVX-512, AVX2, baseline), so
// a wheel built anywhere uses what the machine has. double has one portable table: it exists for
// float64 oracles.
#pragma once
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define KLQ_X86_TARGETS 1
#endif

namespace klq {

constexpr int64_t kBlock = 1024;  // a float block and its copy stay in the first-level cache

enum class Type : uint8_t { f32, bf16, f16, f64 };

// z' = softcap * tanh(z / softcap) / temperature; softcap 0 means none. A logit of -inf stays -inf.
struct Scaling {
  double temperature;
  double softcap;
  bool identity() const { return temperature == 1.0 && softcap == 0.0; }
};

// W is the working precision: float for float32, bfloat16 and float16 data, double for float64.
template <class W>
struct Math {
  // out = in as W; n <= kBlock
  void (*read)(Type type, const void* in, W* out, int64_t n);
  // out = in rounded to nearest even
  void (*write)(Type type, const W* in, void* out, int64_t n);
  // x = scaled(x)
  void (*scale)(W* x, int64_t n, Scaling s);
  // product *= d scaled(x) / dx at the logits x, under a softcap; 0 at -inf
  void (*slope)(const W* logit, W* product, int64_t n, Scaling s);
  W (*max)(const W* x, int64_t n);  // -inf for n = 0
  // sum exp(x - m); terms of x = -inf are 0
  double (*sum_exp)(const W* x, int64_t n, W m);
  // sum exp(x - m) * (x - m), terms of x = -inf are 0
  double (*sum_exp_x)(const W* x, int64_t n, W m);
  // sum exp(x - m) * ((x - m) - (y - my)), terms with exp = 0 are 0
  double (*sum_exp_diff)(const W* x, const W* y, int64_t n, W m, W my);
  // out = a * exp(x - m), 0 where x = -inf whatever a is; out may be x
  void (*exp_times)(const W* x, W* out, int64_t n, W m, W a);
  // out = a (((x - m) - (y - my)) - c) + b, -inf where x = -inf
  void (*scaled_diff)(const W* x, const W* y, W* out, int64_t n, W m, W my, W c, W a, W b);
  // out = (y - my) + a x, -inf where x or y is
  void (*tilt)(const W* x, const W* y, W* out, int64_t n, W my, W a);
};

template <class W>
const Math<W>& math();

// The best instruction set this machine and KLQ_CPU_ISA (baseline, avx2, avx512) allow.
enum class Isa : uint8_t { baseline, avx2, avx512 };
Isa isa();
const char* isa_name();

}  // namespace klq
