// SPDX-License-Identifier: Apache-2.0
// Logits to lambda-returns: the rows of both models, then the scan of their difference.
#include "cpu/sequences.h"
#include "cpu/token_logprobs.h"

namespace klq {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> klq_targets(
    Tensor logits, Tensor actions, Tensor values, Tensor rewards, MaybeTensor ref_logits,
    MaybeTensor ref_logprobs, double tau, double gamma, double lam, MaybeTensor lam_rows,
    double alpha, MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor bootstrap,
    double temperature, double softcap) {
  const char* op = "klq_targets";
  const Rows rows = rows_of(op, logits);
  const Rows ref = ref_logits ? rows_of(op, *ref_logits) : Rows{};
  KLQ_CHECK(op, ref_logits.has_value() != ref_logprobs.has_value(),
            "exactly one of ref_logits and ref_logprobs is needed");
  KLQ_CHECK(op, !ref_logits || (ref.count == rows.count && ref.width == rows.width),
            "ref_logits must have the shape of logits");
  const Sequences seqs(op, actions, cu_seqlens);
  const auto action = ids(op, "actions", actions, rows.count);
  const auto use = mask_of(op, mask, rows.count);
  const Scaling scaling{temperature, softcap};
  const bool wide = is_double(logits) || is_double(values) || is_double(rewards) ||
                    is_double(ref_logits) || is_double(ref_logprobs) || is_double(lam_rows) ||
                    is_double(bootstrap);
  return with_precision(wide, [&](auto w) {
    using W = decltype(w);
    const int64_t n = rows.count, end = seqs.ends ? seqs.begin(seqs.count) : n;
    const auto v = reals<W>(op, "values", values, n);
    const auto r = reals<W>(op, "rewards", rewards, n);
    const auto cached = reals<W>(op, "ref_logprobs", ref_logprobs, n);
    const auto lams = reals<W>(op, "lam", lam_rows, seqs.per_sequence());
    const auto boot = reals<W>(op, "bootstrap", bootstrap, seqs.per_sequence());
    auto fresh = [&] { return new_empty(logits, actions.sizes(), scalar_type<W>); };
    Tensor lp = fresh(), rp = fresh(), rho = fresh(), q = fresh(), a = fresh(), g = fresh();
    W *logprob = data<W>(lp), *ref_logprob = data<W>(rp), *ratio = data<W>(rho);
    for_rows(rows, [&](int64_t i) {
      logprob[i] = ref_logprob[i] = ratio[i] = 0;
      if (i >= end || (use && !use[i])) return;
      logprob[i] = logprob_of(target(Row<W>(rows, i, scaling), action[i]), action[i], rows.width);
      ref_logprob[i] =
          cached ? cached[i]
                 : logprob_of(target(Row<W>(ref, i, scaling), action[i]), action[i], rows.width);
      // of the rounded log-probs: policy = reference gives exactly 0, cached or not
      ratio[i] = logprob[i] - ref_logprob[i];
    });
    const Scan<W> args{ratio, v.data, r.data,     nullptr,    use.data,  tau,
                       gamma, alpha,  data<W>(q), data<W>(a), data<W>(g)};
    scan_all(args, seqs, lam, lams, boot);
    return std::make_tuple(lp, rp, rho, q, a, g);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("klq_targets", TORCH_BOX(&klq_targets)); }

}  // namespace klq
