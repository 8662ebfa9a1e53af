// SPDX-License-Identifier: Apache-2.0
// Reverse scan of eq. (7) in its W form, W_t = V_t + c_t A_t and A_t = (r_t - Q_t) + gamma W_next.
//
// One warp a sequence, 32 tokens a step, right to left. A token maps the carry affinely,
// W = d + f W_next with f = c gamma (the identity if inactive); lanes compose their maps by
// shuffles in a fixed order, so results are the same bits on every run. The composition is in
// double, which keeps (gamma lambda)^n exact enough at any length.
#include "cuda/lambda_returns.h"

namespace klq::cuda {
namespace {

constexpr int kWarps = 4;

__global__ void __launch_bounds__(32 * kWarps) lambda_returns_kernel(const ScanArgs s) {
  const int lane = threadIdx.x % 32;
  const int64_t sequence = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (sequence >= s.sequences) return;

  int64_t begin = sequence * s.length, end = begin + s.length;
  if (s.cu_seqlens) {  // clamped: ends that nobody checked cannot leave the buffers
    begin = min(max(s.cu_seqlens[sequence], int64_t(0)), s.tokens);
    end = min(max(s.cu_seqlens[sequence + 1], begin), s.tokens);
  }
  const double lam = s.lam_rows ? double(s.lam_rows[sequence]) : s.lam;
  double carry = s.bootstrap ? double(s.bootstrap[sequence]) : 0.0;

  for (int64_t stop = end; stop > begin; stop -= 32) {
    const int64_t t = stop - 32 + lane;
    const bool inside = t >= begin;
    const bool active = inside && (!s.mask || s.mask[t]);
    double q = 0, u = 0, d = 0, f = 1;
    if (active) {
      const double v = s.values[t];
      q = s.log_ratios ? s.tau * double(s.log_ratios[t]) + v : v;
      u = double(s.rewards[t]) - q;
      const double c = s.trace ? double(s.trace[t]) : lam;
      d = v + c * u;
      f = c * s.gamma;
    }
    // suffix composition: after it, lane i maps the carry past lane 31 to W of lane i
    for (int step = 1; step < 32; step *= 2) {
      const double right_d = __shfl_down_sync(~0u, d, step);
      const double right_f = __shfl_down_sync(~0u, f, step);
      if (lane + step < 32) {
        // a zero factor cuts: nothing from the right may enter, not even a NaN
        d = f == 0 ? d : d + f * right_d;
        f = f * right_f;
      }
    }
    const double w = f == 0 ? d : d + f * carry;
    double next = __shfl_down_sync(~0u, w, 1);
    if (lane == 31) next = carry;
    carry = __shfl_sync(~0u, w, 0);
    if (!inside) continue;
    const double a = s.gamma == 0 ? u : u + s.gamma * next;
    if (s.q) s.q[t] = active ? float(q) : 0.0f;
    s.advantages[t] = active ? float(a) : 0.0f;
    s.returns[t] = active ? float(q + s.alpha * a) : 0.0f;
  }
}

}  // namespace

cudaError_t scan(const ScanArgs& args, cudaStream_t stream) {
  if (args.sequences == 0 || args.tokens == 0) return cudaSuccess;
  const int64_t blocks = (args.sequences + kWarps - 1) / kWarps;
  lambda_returns_kernel<<<unsigned(blocks), 32 * kWarps, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace klq::cuda
