// SPDX-License-Identifier: Apache-2.0
// The gradient of token log-probs: one read and one write of a row, its sum known from the forward.
#include "cuda/row_launch.cuh"
#include "cuda/token_logprobs.h"

namespace klq::cuda {
namespace {

template <class Reader, bool CAPPED, int LANES>
__global__ void __launch_bounds__(RowGroup<LANES>::kThreads, RowGroup<LANES>::blocks())
    token_logprobs_bwd_kernel(const Rows rows, const Rows gradients, const Scale scale,
                              const LogprobGradArgs a) {
  const RowGroup<LANES> group;
  for (int64_t r = group.first; r < rows.count; r += group.step) {
    if (a.mask && !a.mask[r]) {
      zero_row<Reader>(rows, gradients, r, group);
      continue;
    }
    const Reader in(rows, nullptr, &gradients, r);
    const int64_t action = a.actions[r];
    const bool known = action >= 0 && action < rows.width;
    const float grad = a.grad[r], rest = a.row_stats[rows.count + r];
    const float max = float(a.row_stats[r] * scale.temperature);  // y
    // p_j = 2^exponent(y_j) 2^-excess / total; 1 - p of the chosen token is rest / total
    const float point = scale.point(max), excess = scale.excess(max);
    auto exponential = [&](float z) {
      return exp2_fast(scale.exponent(capped<CAPPED>(z, scale), max, point));
    };
    const float undo = exp2f(-excess);
    const float own = known ? exponential(in.get(int(action))) * undo
                            : expf(a.row_stats[2 * rows.count + r] - a.row_stats[r]);
    group.meet();  // in place the chosen logit is overwritten: all have read it
    const float total = rest + own, factor = -grad * undo / total;
    auto gradient = [&](float z, int column) {
      const float s = slope<CAPPED>(z, scale), e = exponential(z);
      if (z == -infinity()) return 0.0f;
      if (column == action) return grad * (rest / total) * s;
      return e == 0.0f ? 0.0f : factor * s * e;
    };
    write_row(in, group, gradient);
  }
}

}  // namespace

cudaError_t logprob_gradient_rows(const Rows& rows, const Rows& gradient, Scaling scaling,
                                  const LogprobGradArgs& args, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  const Scale scale(scaling);
  return with_reader(rows, nullptr, &gradient, [&](auto reader, auto lanes) {
    using Reader = typename decltype(reader)::type;
    using G = RowGroup<lanes.value>;
    // a block a row: the hardware evens out what masks and the end leave uneven
    const int64_t blocks = (rows.count + G::kTogether - 1) / G::kTogether;
    auto kernel = scaling.softcap > 0 ? token_logprobs_bwd_kernel<Reader, true, lanes.value>
                                      : token_logprobs_bwd_kernel<Reader, false, lanes.value>;
    kernel<<<unsigned(blocks), G::kThreads, 0, stream>>>(rows, gradient, scale, args);
    return cudaGetLastError();
  });
}

}  // namespace klq::cuda
