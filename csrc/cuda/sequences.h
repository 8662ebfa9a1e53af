// SPDX-License-Identifier: Apache-2.0
// Inputs and outputs of the reverse scan on the device, shared by lambda_returns and gae.
#pragma once
#include "cuda/glue.h"
#include "cuda/lambda_returns.h"

namespace klq::cuda {

struct ScanInputs {
  MaybeTensor log_ratios;
  Tensor values, rewards;
  MaybeTensor lam_rows, mask, cu_seqlens, bootstrap, trace;
  double tau, gamma, lam, alpha;
};

// Fills q (if wanted), advantages and returns.
inline void run_scan(const char* op, const ScanInputs& in, Tensor* q, Tensor& advantages,
                     Tensor& returns) {
  const Tensor& v = in.values;
  for (const MaybeTensor& x : {in.log_ratios, MaybeTensor(v), MaybeTensor(in.rewards), in.lam_rows,
                               in.bootstrap, in.trace})
    KLQ_CHECK(op, !x || x->scalar_type() != ScalarType::Double, "there is no float64 on CUDA");
  const int64_t n = v.numel();
  ScanArgs s{};
  s.tokens = n;
  if (in.cu_seqlens) {
    KLQ_CHECK(op, v.dim() == 1 && in.cu_seqlens->numel() >= 1,
              "cu_seqlens goes with packed [N] inputs");
    s.sequences = in.cu_seqlens->numel() - 1;
  } else {
    KLQ_CHECK(op, v.dim() >= 1, "expected [..., T]");
    s.length = v.size(v.dim() - 1);
    s.sequences = s.length ? n / s.length : 0;
  }
  const bool rowwise = in.cu_seqlens.has_value() || s.length;
  const int64_t per_sequence = rowwise ? s.sequences : -1;
  const auto f32 = ScalarType::Float;
  const Array<float> rho(op, "log_ratios", in.log_ratios, f32, v, n);
  const Array<float> value(op, "values", v, f32, v, n);
  const Array<float> reward(op, "rewards", in.rewards, f32, v, n);
  const Array<float> trace(op, "trace", in.trace, f32, v, n);
  const Array<float> lams(op, "lam", in.lam_rows, f32, v, per_sequence);
  const Array<float> boot(op, "bootstrap", in.bootstrap, f32, v, per_sequence);
  const Array<bool> mask(op, "mask", in.mask, ScalarType::Bool, v, n);
  const Array<int64_t> ends(op, "cu_seqlens", in.cu_seqlens, ScalarType::Long, v, -1);
  s.log_ratios = rho.data, s.values = value.data, s.rewards = reward.data;
  s.trace = trace.data, s.lam_rows = lams.data, s.bootstrap = boot.data;
  s.mask = mask.data, s.cu_seqlens = ends.data;
  s.tau = in.tau, s.gamma = in.gamma, s.lam = in.lam, s.alpha = in.alpha;
  s.q = q ? floats(*q) : nullptr, s.advantages = floats(advantages), s.returns = floats(returns);
  STD_CUDA_CHECK(scan(s, current_stream(v)));
}

// Tokens that belong to no sequence are never visited, so packed outputs start at 0.
inline Tensor scan_output(const Tensor& like, bool packed) {
  return packed ? torch::stable::new_zeros(like, like.sizes(), ScalarType::Float)
                : torch::stable::new_empty(like, like.sizes(), ScalarType::Float);
}

}  // namespace klq::cuda
