// SPDX-License-Identifier: Apache-2.0
#include "cpu/klq_loss.h"

#include "cpu/glue.h"

namespace klq {
namespace {

using torch::stable::new_empty;

struct LossOut {
  Tensor loss, stats, dvalues, unscale;
};

Tensor vector_like(const Tensor& x, int64_t count, ScalarType dtype) {
  const std::vector<int64_t> shape{count};
  return new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape), dtype);
}

// One pass over the rows: log-prob, residual, and the gradient into `grads` (nullptr: none).
LossOut run(const char* op, const Tensor& logits, const Rows& rows, const Rows* grads,
            const Tensor& actions, const Tensor& values, const Tensor& ref_logprobs,
            const Tensor& returns, double tau, const MaybeTensor& mask, const MaybeTensor& weights,
            const MaybeTensor& normalizer, Scaling scaling) {
  const int64_t count = rows.count;
  const auto action = ids(op, "actions", actions, count);
  const auto use = mask_of(op, mask, count);
  int64_t active = count;
  if (use) active = std::count(use.data, use.data + count, true);
  const bool half = rows.type == Type::f16;
  return with_precision(is_double(logits), [&](auto w) {
    using W = decltype(w);
    const auto v = reals<W>(op, "values", values, count);
    const auto ref = reals<W>(op, "ref_logprobs", ref_logprobs, count);
    const auto g = reals<W>(op, "returns", returns, count);
    const auto weight = reals<W>(op, "weights", weights, count);
    const auto given = reals<double>(op, "normalizer", normalizer, 1);
    const double n = given ? given[0] : double(std::max<int64_t>(1, active));

    const std::vector<int64_t> scalar;
    LossOut out{new_empty(logits, torch::headeronly::IntHeaderOnlyArrayRef(scalar), scalar_type<W>),
                vector_like(logits, 4, scalar_type<W>),
                grads ? new_empty(logits, actions.sizes(), scalar_type<W>)
                      : vector_like(logits, 0, scalar_type<W>),
                grads && half ? new_empty(logits, actions.sizes(), ScalarType::Float)
                              : vector_like(logits, 0, ScalarType::Float)};
    W* dv = data<W>(out.dvalues);
    float* unscale = data<float>(out.unscale);
    std::vector<Residual> tokens(count);  // summed in order below: the same bits for any threads
    for_rows(rows, [&](int64_t i) {
      tokens[i] = {0, 0};
      if (use && !use[i]) {
        if (grads) zero_row(*grads, i), dv[i] = 0;
        if (grads && half) unscale[i] = 1;
        return;
      }
      const Row<W> row(rows, i, scaling);
      const Target<W> t = target(row, action[i]);
      const double logprob = logprob_of(t, action[i], rows.width);
      const double residual = tau * (logprob - ref[i]) + v[i] - g[i];
      tokens[i] = {logprob, residual};
      if (!grads) return;
      const double dq = 2 * (weight ? weight[i] : 1) * residual / n;
      dv[i] = W(dq);
      const float undo = loss_gradient(row, action[i], t, tau * dq, grads->row(i));
      if (half) unscale[i] = undo;
    });
    double loss = 0, squares = 0, logprobs = 0, value_sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (use && !use[i]) continue;
      const double square = tokens[i].residual * tokens[i].residual;
      loss += (weight ? weight[i] : 1) * square;
      squares += square, logprobs += tokens[i].logprob, value_sum += v[i];
    }
    data<W>(out.loss)[0] = W(loss / n);
    W* stats = data<W>(out.stats);
    stats[0] = W(squares), stats[1] = W(logprobs), stats[2] = W(value_sum), stats[3] = W(active);
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> klq_loss(
    Tensor logits, Tensor actions, Tensor values, Tensor ref_logprobs, Tensor returns, double tau,
    MaybeTensor mask, MaybeTensor weights, MaybeTensor normalizer, double temperature,
    double softcap, bool need_grad) {
  const char* op = "klq_loss";
  const Rows rows = rows_of(op, logits);
  Tensor dlogits = need_grad ? new_rows(logits) : vector_like(logits, 0, logits.scalar_type());
  const Rows grads = need_grad ? rows_of(op, dlogits) : Rows{};
  LossOut out = run(op, logits, rows, need_grad ? &grads : nullptr, actions, values, ref_logprobs,
                    returns, tau, mask, weights, normalizer, {temperature, softcap});
  return {out.loss, out.stats, dlogits, out.dvalues, out.unscale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> klq_loss_(Tensor logits, Tensor actions, Tensor values,
                                                     Tensor ref_logprobs, Tensor returns,
                                                     double tau, MaybeTensor mask,
                                                     MaybeTensor weights, MaybeTensor normalizer,
                                                     double temperature, double softcap) {
  const char* op = "klq_loss_";
  const Rows rows = rows_of(op, logits);
  LossOut out = run(op, logits, rows, &rows, actions, values, ref_logprobs, returns, tau, mask,
                    weights, normalizer, {temperature, softcap});
  return {out.loss, out.stats, out.dvalues, out.unscale};
}

// dlogits *= upstream * unscale[row]; rows whose factor is 1 are left alone, and 0 stays 0 under an
// upstream that is not finite.
void klq_loss_backward_(Tensor dlogits, Tensor unscale, Tensor upstream) {
  const char* op = "klq_loss_backward_";
  const Rows rows = rows_of(op, dlogits);
  const bool scaled = unscale.numel() > 0;
  with_precision(is_double(dlogits), [&](auto w) {
    using W = decltype(w);
    const auto factor = reals<W>(op, "upstream", upstream, 1);
    const auto undo = reals<W>(op, "unscale", unscale, scaled ? rows.count : 0);
    if (!scaled && factor[0] == W(1)) return 0;
    for_rows(rows, [&](int64_t i) {
      const W f = factor[0] * (scaled ? undo[i] : W(1));
      if (f == W(1)) return;
      W x[kBlock];
      for (int64_t b = 0; b < rows.width; b += kBlock) {
        const int64_t n = std::min(kBlock, rows.width - b);
        char* p = rows.row(i) + rows.size * b;
        math<W>().read(rows.type, p, x, n);
        for (int64_t j = 0; j < n; ++j) x[j] = x[j] == 0 ? W(0) : x[j] * f;
        math<W>().write(rows.type, x, p, n);
      }
    });
    return 0;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) {
  m.impl("klq_loss", TORCH_BOX(&klq_loss));
  m.impl("klq_loss_", TORCH_BOX(&klq_loss_));
  m.impl("klq_loss_backward_", TORCH_BOX(&klq_loss_backward_));
}

}  // namespace klq
