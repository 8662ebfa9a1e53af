// SPDX-License-Identifier: Apache-2.0
// Inputs and outputs of the reverse scan on the device, shared by lambda_returns, gae and
// place_scores.
#pragma once
#include "cuda/glue.h"
#include "cuda/lambda_returns.h"
#include "scan_shapes.h"

namespace klq::cuda {

struct RealInput : Input {
  Reals reals;

  RealInput(const char* op, const char* name, const MaybeTensor& x, const Tensor& like,
            int64_t count)
      : Input(op, name, x, like, count) {
    if (!x) return;
    const ScalarType type = x->scalar_type();
    KLQ_CHECK(op,
              type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
              name, " must be float32, bfloat16 or float16 on CUDA");
    reals.data = data();
    reals.type = type == ScalarType::Float      ? Type::f32
                 : type == ScalarType::BFloat16 ? Type::bf16
                                                : Type::f16;
    reals.vector = aligned(reals.type == Type::f32 ? 16 : 8);
  }
};

struct MaskInput : Input {
  MaskInput(const char* op, const MaybeTensor& x, const Tensor& like, int64_t count)
      : Input(op, "mask", x, like, count) {
    KLQ_CHECK(op, !x || x->scalar_type() == ScalarType::Bool, "mask must be bool");
  }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(data()); }
};

struct SequencesInput : Input {
  Sequences seqs;

  SequencesInput(const char* op, const Tensor& tokens, const MaybeTensor& cu_seqlens)
      : Input(op, "cu_seqlens", cu_seqlens, tokens, -1) {
    seqs.tokens = tokens.numel();
    if (cu_seqlens) {
      const ScalarType type = cu_seqlens->scalar_type();
      KLQ_CHECK(op, tokens.dim() == 1 && cu_seqlens->numel() >= 1,
                "cu_seqlens goes with packed [N] inputs");
      KLQ_CHECK(op, type == ScalarType::Int || type == ScalarType::Long,
                "cu_seqlens must be int32 or int64");
      seqs.ends = data();
      seqs.wide_ends = type == ScalarType::Long;
      seqs.count = cu_seqlens->numel() - 1;
    } else {
      KLQ_CHECK(op, tokens.dim() >= 1, "expected [..., T]");
      seqs.length = tokens.size(tokens.dim() - 1);
      seqs.count = seqs.length ? seqs.tokens / seqs.length : 0;
    }
  }
  // elements a per-sequence input must have; -1 (any) for rows of no tokens
  int64_t per_sequence() const { return seqs.ends || seqs.length ? seqs.count : -1; }
};

struct ScanInputs {
  const MaybeTensor& log_ratios;
  const Tensor &values, &rewards;
  const MaybeTensor &lam_rows, &mask, &cu_seqlens, &bootstrap, &trace;
  double tau, gamma, lam, alpha;
};

// Fills q (if wanted), advantages and returns.
inline void run_scan(const char* op, const ScanInputs& in, Tensor* q, Tensor& advantages,
                     Tensor& returns) {
  const Tensor& v = in.values;
  const ScanShapes shapes(op, v, in.cu_seqlens);
  shapes.token("log_ratios", in.log_ratios), shapes.token("rewards", in.rewards);
  shapes.token("mask", in.mask), shapes.token("trace", in.trace);
  shapes.sequence("lam", in.lam_rows), shapes.sequence("bootstrap", in.bootstrap);
  const SequencesInput seqs(op, v, in.cu_seqlens);
  const int64_t n = seqs.seqs.tokens, rows = seqs.per_sequence();
  const RealInput rho(op, "log_ratios", in.log_ratios, v, n), value(op, "values", v, v, n),
      reward(op, "rewards", in.rewards, v, n), trace(op, "trace", in.trace, v, n),
      lam(op, "lam", in.lam_rows, v, rows), boot(op, "bootstrap", in.bootstrap, v, rows);
  const MaskInput mask(op, in.mask, v, n);
  ScanArgs s;
  s.seqs = seqs.seqs;
  s.log_ratios = rho.reals, s.values = value.reals, s.rewards = reward.reals;
  s.trace = trace.reals, s.lam_rows = lam.reals, s.bootstrap = boot.reals;
  s.mask = mask.bytes(), s.mask_vector = mask.aligned(4);
  s.tau = in.tau, s.gamma = in.gamma, s.lam = in.lam, s.alpha = in.alpha;
  s.q = q ? floats(*q) : nullptr, s.advantages = floats(advantages), s.returns = floats(returns);
  for (const float* out : {s.q, s.advantages, s.returns})
    s.outputs_vector = s.outputs_vector && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const ScanPlan plan = plan_scan(s.seqs);
  MaybeTensor scratch;
  if (plan.scratch) scratch = new_on_device(v, {&plan.scratch, 1}, aoti_torch_dtype_float64());
  double* maps = scratch ? static_cast<double*>(scratch->data_ptr()) : nullptr;
  STD_CUDA_CHECK(launch_scan(s, plan, maps, current_stream(v)));
}

}  // namespace klq::cuda
