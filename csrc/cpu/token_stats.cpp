// SPDX-License-Identifier: Apache-2.0
#include "cpu/token_stats.h"

#include "cpu/glue.h"

namespace klq {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor, Tensor, Tensor> token_stats(Tensor logits, Tensor actions,
                                                       MaybeTensor ref_logits, MaybeTensor mask,
                                                       double temperature, double softcap) {
  const char* op = "token_stats";
  const Rows rows = rows_of(op, logits);
  const Rows ref = ref_logits ? rows_of(op, *ref_logits) : Rows{};
  KLQ_CHECK(op, !ref_logits || (ref.count == rows.count && ref.width == rows.width),
            "ref_logits must have the shape of logits");
  const auto action = ids(op, "actions", actions, rows.count);
  const auto use = mask_of(op, mask, rows.count);
  const Scaling scaling{temperature, softcap};
  return with_precision(is_double(logits) || is_double(ref_logits), [&](auto w) {
    using W = decltype(w);
    const std::vector<int64_t> none{0};
    Tensor logprobs = new_empty(logits, actions.sizes(), scalar_type<W>);
    Tensor entropies = new_empty(logits, actions.sizes(), scalar_type<W>);
    Tensor ref_logprobs =
        ref_logits
            ? new_empty(logits, actions.sizes(), scalar_type<W>)
            : new_empty(logits, torch::headeronly::IntHeaderOnlyArrayRef(none), scalar_type<W>);
    Tensor kls = ref_logits ? new_empty(logits, actions.sizes(), scalar_type<W>)
                            : new_empty(logits, torch::headeronly::IntHeaderOnlyArrayRef(none),
                                        scalar_type<W>);
    W *logprob = data<W>(logprobs), *h = data<W>(entropies);
    W *ref_logprob = data<W>(ref_logprobs), *kl = data<W>(kls);
    for_rows(rows, [&](int64_t i) {
      const bool active = !use || use[i];
      logprob[i] = h[i] = 0;
      if (ref_logits) ref_logprob[i] = kl[i] = 0;
      if (!active) return;
      const Row<W> row(rows, i, scaling);
      const Target<W> t = target(row, action[i]);
      logprob[i] = logprob_of(t, action[i], rows.width);
      h[i] = W(entropy(row, t));
      if (!ref_logits) return;
      const Row<W> ref_row(ref, i, scaling);
      const Target<W> b = target(ref_row, action[i]);
      ref_logprob[i] = logprob_of(b, action[i], rows.width);
      kl[i] = W(divergence(row, t, ref_row, b));
    });
    return std::make_tuple(logprobs, entropies, ref_logprobs, kls);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("token_stats", TORCH_BOX(&token_stats)); }

}  // namespace klq
