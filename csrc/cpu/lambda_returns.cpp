// SPDX-License-Identifier: Apache-2.0
#include "cpu/lambda_returns.h"

#include "cpu/sequences.h"

namespace klq {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor> lambda_returns(Tensor log_ratios, Tensor values, Tensor rewards,
                                                  double tau, double gamma, double lam,
                                                  MaybeTensor lam_rows, double alpha,
                                                  MaybeTensor mask, MaybeTensor cu_seqlens,
                                                  MaybeTensor bootstrap, MaybeTensor trace) {
  const char* op = "lambda_returns";
  const ScanShapes shapes(op, values, cu_seqlens);
  shapes.token("log_ratios", log_ratios), shapes.token("rewards", rewards);
  shapes.token("mask", mask), shapes.token("trace", trace);
  shapes.sequence("lam", lam_rows), shapes.sequence("bootstrap", bootstrap);
  const Sequences seqs(op, values, cu_seqlens);
  const bool wide = is_double(log_ratios) || is_double(values) || is_double(rewards) ||
                    is_double(lam_rows) || is_double(bootstrap) || is_double(trace);
  return with_precision(wide, [&](auto w) {
    using W = decltype(w);
    const int64_t n = seqs.tokens;
    const auto rho = reals<W>(op, "log_ratios", log_ratios, n);
    const auto v = reals<W>(op, "values", values, n);
    const auto r = reals<W>(op, "rewards", rewards, n);
    const auto c = reals<W>(op, "trace", trace, n);
    const auto rows = reals<W>(op, "lam", lam_rows, seqs.per_sequence());
    const auto boot = reals<W>(op, "bootstrap", bootstrap, seqs.per_sequence());
    const auto use = mask_of(op, mask, n);
    Tensor q = new_empty(values, values.sizes(), scalar_type<W>);
    Tensor a = new_empty(values, values.sizes(), scalar_type<W>);
    Tensor g = new_empty(values, values.sizes(), scalar_type<W>);
    const Scan<W> args{rho.data, v.data, r.data,     c.data,     use.data,  tau,
                       gamma,    alpha,  data<W>(q), data<W>(a), data<W>(g)};
    scan_all(args, seqs, lam, rows, boot);
    return std::make_tuple(q, a, g);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("lambda_returns", TORCH_BOX(&lambda_returns)); }

}  // namespace klq
