// SPDX-License-Identifier: Apache-2.0
#include "cuda/klq_loss.h"

#include "cuda/row_glue.h"

namespace klq::cuda {
namespace {

struct Loss {
  Tensor loss, stats, dvalues, unscale;
};

// One pass over the rows, and the sum of what they leave; `gradient` null: loss only.
Loss run(const char* op, const Tensor& logits, const Rows& rows, const Rows* gradient,
         const Tensor& actions, const Tensor& values, const Tensor& ref_logprobs,
         const Tensor& returns, double tau, const MaybeTensor& mask, const MaybeTensor& weights,
         const MaybeTensor& normalizer, Scaling scaling) {
  const cudaStream_t stream = current_stream(logits);
  const int64_t n = rows.count;
  const auto f32 = ScalarType::Float;
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, logits, n);
  const Array<float> v(op, "values", values, f32, logits, n);
  const Array<float> ref(op, "ref_logprobs", ref_logprobs, f32, logits, n);
  const Array<float> g(op, "returns", returns, f32, logits, n);
  const Array<float> w(op, "weights", weights, f32, logits, n);
  const Array<float> norm(op, "normalizer", normalizer, f32, logits, 1);
  const Mask use(op, mask, logits, n, stream);
  const bool half = rows.type == Type::f16;
  Loss out{new_floats(logits, {}), new_vector(logits, 4), new_tokens(logits, actions, gradient),
           new_tokens(logits, actions, gradient && half)};
  Tensor scratch = new_vector(logits, 2 * n);
  KLQLossArgs a{};
  a.actions = ids.data, a.values = v.data, a.ref_logprobs = ref.data, a.returns = g.data;
  a.weights = w.data, a.normalizer = norm.data, a.tau = tau;
  a.logprobs = floats(scratch), a.residuals = a.logprobs + n;
  a.dvalues = gradient ? floats(out.dvalues) : nullptr;
  a.unscale = gradient && half ? floats(out.unscale) : nullptr;
  a.loss = floats(out.loss), a.stats = floats(out.stats);
  STD_CUDA_CHECK(klq_loss_rows(rows, gradient, use.bits.data, use.rows, scaling, a, stream));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> klq_loss(
    Tensor logits, Tensor actions, Tensor values, Tensor ref_logprobs, Tensor returns, double tau,
    MaybeTensor mask, MaybeTensor weights, MaybeTensor normalizer, double temperature,
    double softcap, bool need_grad) {
  const char* op = "klq_loss";
  const OnDeviceOf guard(op, "logits", logits);
  const Rows rows = rows_of(op, logits);
  const int64_t none = 0;
  Tensor dlogits = need_grad ? new_like(logits, logits.sizes()) : new_like(logits, {&none, 1});
  const Rows gradient = need_grad ? rows_of(op, dlogits) : Rows{};
  Loss out = run(op, logits, rows, need_grad ? &gradient : nullptr, actions, values, ref_logprobs,
                 returns, tau, mask, weights, normalizer, {temperature, softcap});
  return {out.loss, out.stats, dlogits, out.dvalues, out.unscale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> klq_loss_(Tensor logits, Tensor actions, Tensor values,
                                                     Tensor ref_logprobs, Tensor returns,
                                                     double tau, MaybeTensor mask,
                                                     MaybeTensor weights, MaybeTensor normalizer,
                                                     double temperature, double softcap) {
  const char* op = "klq_loss_";
  const OnDeviceOf guard(op, "logits", logits);
  const Rows rows = rows_of(op, logits);
  Loss out = run(op, logits, rows, &rows, actions, values, ref_logprobs, returns, tau, mask,
                 weights, normalizer, {temperature, softcap});
  return {out.loss, out.stats, out.dvalues, out.unscale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> klq_loss_tokens(Tensor logprobs, Tensor values,
                                                           Tensor ref_logprobs, Tensor returns,
                                                           double tau, MaybeTensor mask,
                                                           MaybeTensor weights, Tensor normalizer) {
  const char* op = "klq_loss_tokens";
  const OnDeviceOf guard(op, "logprobs", logprobs);
  const cudaStream_t stream = current_stream(logprobs);
  const int64_t n = logprobs.numel();
  const auto f32 = ScalarType::Float;
  const Array<float> lp(op, "logprobs", logprobs, f32, logprobs, n);
  const Array<float> v(op, "values", values, f32, logprobs, n);
  const Array<float> ref(op, "ref_logprobs", ref_logprobs, f32, logprobs, n);
  const Array<float> g(op, "returns", returns, f32, logprobs, n);
  const Array<float> w(op, "weights", weights, f32, logprobs, n);
  const Array<float> norm(op, "normalizer", normalizer, f32, logprobs, 1);
  const Mask use(op, mask, logprobs, n, stream);
  Tensor loss = new_floats(logprobs, {}), stats = new_vector(logprobs, 4);
  Tensor dlogprobs = new_vector(logprobs, n), dvalues = new_vector(logprobs, n);
  KLQLossArgs a{};
  a.values = v.data, a.ref_logprobs = ref.data, a.returns = g.data, a.weights = w.data;
  a.normalizer = norm.data, a.tau = tau;
  a.logprobs = const_cast<float*>(lp.data), a.residuals = floats(dlogprobs);
  a.dvalues = floats(dvalues), a.loss = floats(loss), a.stats = floats(stats);
  STD_CUDA_CHECK(loss_of_tokens(use.bits.data, use.rows, n, a, stream));
  return {loss, stats, dlogprobs, dvalues};
}

void klq_loss_backward_(Tensor dlogits, Tensor unscale, Tensor upstream) {
  const char* op = "klq_loss_backward_";
  const OnDeviceOf guard(op, "dlogits", dlogits);
  const Rows rows = rows_of(op, dlogits);
  const bool scaled = unscale.numel() > 0;
  const Array<float> factor(op, "upstream", upstream, ScalarType::Float, dlogits, 1);
  const Array<float> undo(op, "unscale", unscale, ScalarType::Float, dlogits,
                          scaled ? rows.count : 0);
  STD_CUDA_CHECK(
      scale_rows(rows, scaled ? undo.data : nullptr, factor.data, current_stream(dlogits)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("klq_loss", TORCH_BOX(&klq_loss));
  m.impl("klq_loss_", TORCH_BOX(&klq_loss_));
  m.impl("klq_loss_tokens", TORCH_BOX(&klq_loss_tokens));
  m.impl("klq_loss_backward_", TORCH_BOX(&klq_loss_backward_));
}

}  // namespace klq::cuda
