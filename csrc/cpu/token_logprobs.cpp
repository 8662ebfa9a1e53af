// SPDX-License-Identifier: Apache-2.0
#include "cpu/token_logprobs.h"

#include "cpu/glue.h"

namespace klq {
namespace {

using torch::stable::new_empty;

std::tuple<Tensor, Tensor> token_logprobs(Tensor logits, Tensor actions, MaybeTensor mask,
                                          double temperature, double softcap) {
  const char* op = "token_logprobs";
  const Rows rows = rows_of(op, logits);
  const auto action = ids(op, "actions", actions, rows.count);
  const auto use = mask_of(op, mask, rows.count);
  const Scaling scaling{temperature, softcap};
  return with_precision(is_double(logits), [&](auto w) {
    using W = decltype(w);
    Tensor logprobs = new_empty(logits, actions.sizes(), scalar_type<W>);
    std::vector<int64_t> shape{3};
    for (int64_t d = 0; d < actions.dim(); ++d) shape.push_back(actions.size(d));
    Tensor row_stats = new_empty(logits, shape, scalar_type<W>);
    W *logprob = data<W>(logprobs), *stats = data<W>(row_stats);
    for_rows(rows, [&](int64_t i) {
      Target<W> t{};
      logprob[i] = 0;
      if (!use || use[i]) {
        t = target(Row<W>(rows, i, scaling), action[i]);
        logprob[i] = logprob_of(t, action[i], rows.width);
      }
      stats[i] = t.max, stats[rows.count + i] = t.rest, stats[2 * rows.count + i] = t.z;
    });
    return std::make_tuple(logprobs, row_stats);
  });
}

// `to` may be the logits' own rows.
void run_backward(const char* op, const Tensor& grad, const Tensor& logits, const Rows& to,
                  const Tensor& actions, const MaybeTensor& mask, const Tensor& row_stats,
                  Scaling scaling) {
  const Rows rows = rows_of(op, logits);
  const auto action = ids(op, "actions", actions, rows.count);
  const auto use = mask_of(op, mask, rows.count);
  with_precision(is_double(logits), [&](auto w) {
    using W = decltype(w);
    const auto upstream = reals<W>(op, "grad", grad, rows.count);
    const auto stats = reals<W>(op, "row_stats", row_stats, 3 * rows.count);
    for_rows(rows, [&](int64_t i) {
      if (use && !use[i]) return zero_row(to, i);
      const Target<W> t{stats[i], stats[rows.count + i], stats[2 * rows.count + i]};
      gradient(Row<W>(rows, i, scaling), action[i], t, upstream[i], to.row(i));
    });
    return 0;
  });
}

Tensor token_logprobs_backward(Tensor grad, Tensor logits, Tensor actions, MaybeTensor mask,
                               Tensor row_stats, double temperature, double softcap) {
  const char* op = "token_logprobs_backward";
  Tensor dlogits = new_rows(logits);
  run_backward(op, grad, logits, rows_of(op, dlogits), actions, mask, row_stats,
               {temperature, softcap});
  return dlogits;
}

void token_logprobs_backward_(Tensor logits, Tensor grad, Tensor actions, MaybeTensor mask,
                              Tensor row_stats, double temperature, double softcap) {
  const char* op = "token_logprobs_backward_";
  run_backward(op, grad, logits, rows_of(op, logits), actions, mask, row_stats,
               {temperature, softcap});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
  m.impl("token_logprobs_backward_", TORCH_BOX(&token_logprobs_backward_));
}

}  // namespace klq
