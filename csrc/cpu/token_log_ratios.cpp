// SPDX-License-Identifier: Apache-2.0
#include "cpu/glue.h"
#include "cpu/token_logprobs.h"

namespace klq {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor> token_log_ratios(Tensor logits, Tensor ref_logits, Tensor actions,
                                            MaybeTensor mask, double temperature, double softcap) {
  const char* op = "token_log_ratios";
  const Rows rows = rows_of(op, logits), ref = rows_of(op, ref_logits);
  KLQ_CHECK(op, ref.count == rows.count && ref.width == rows.width,
            "ref_logits must have the shape of logits");
  const auto action = ids(op, "actions", actions, rows.count);
  const auto use = mask_of(op, mask, rows.count);
  const Scaling scaling{temperature, softcap};
  return with_precision(is_double(logits) || is_double(ref_logits), [&](auto w) {
    using W = decltype(w);
    Tensor ratios = new_empty(logits, actions.sizes(), scalar_type<W>);
    std::vector<int64_t> shape{3};
    for (int64_t d = 0; d < actions.dim(); ++d) shape.push_back(actions.size(d));
    Tensor row_stats = new_empty(logits, shape, scalar_type<W>);
    W *ratio = data<W>(ratios), *stats = data<W>(row_stats);
    for_rows(rows, [&](int64_t i) {
      Target<W> t{};
      ratio[i] = 0;
      if (!use || use[i]) {
        t = target(Row<W>(rows, i, scaling), action[i]);
        const Target<W> b = target(Row<W>(ref, i, scaling), action[i]);
        ratio[i] =
            W(logprob_of(t, action[i], rows.width)) - W(logprob_of(b, action[i], rows.width));
      }
      stats[i] = t.max, stats[rows.count + i] = t.rest, stats[2 * rows.count + i] = t.z;
    });
    return std::make_tuple(ratios, row_stats);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("token_log_ratios", TORCH_BOX(&token_log_ratios)); }

}  // namespace klq
