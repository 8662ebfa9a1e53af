// SPDX-License-Identifier: Apache-2.0
// GAE is the scan of lambda_returns with Q = V and alpha = 1.
#include "cpu/sequences.h"

namespace klq {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, double gamma, double lam,
                               MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor bootstrap) {
  const char* op = "gae";
  const ScanShapes shapes(op, values, cu_seqlens);
  shapes.token("rewards", rewards), shapes.token("mask", mask);
  shapes.sequence("bootstrap", bootstrap);
  const Sequences seqs(op, values, cu_seqlens);
  const bool wide = is_double(rewards) || is_double(values) || is_double(bootstrap);
  return with_precision(wide, [&](auto w) {
    using W = decltype(w);
    const auto v = reals<W>(op, "values", values, seqs.tokens);
    const auto r = reals<W>(op, "rewards", rewards, seqs.tokens);
    const auto boot = reals<W>(op, "bootstrap", bootstrap, seqs.per_sequence());
    const auto use = mask_of(op, mask, seqs.tokens);
    Tensor a = new_empty(values, values.sizes(), scalar_type<W>);
    Tensor g = new_empty(values, values.sizes(), scalar_type<W>);
    const Scan<W> args{nullptr, v.data, r.data,  nullptr,    use.data,  0,
                       gamma,   1.0,    nullptr, data<W>(a), data<W>(g)};
    scan_all(args, seqs, lam, Array<W>{}, boot);
    return std::make_tuple(a, g);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace klq
