// SPDX-License-Identifier: Apache-2.0
// Every schema of torch.ops.klq, one line an op; implementations register themselves in cpu/,
// cuda/.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(klq, m) {
  m.def("token_logprobs(Tensor logits, Tensor actions, Tensor? mask, float temperature, float softcap) -> (Tensor, Tensor)");
  m.def("token_logprobs_backward(Tensor grad, Tensor logits, Tensor actions, Tensor? mask, Tensor row_stats, float temperature, float softcap) -> Tensor");
  m.def("token_logprobs_backward_(Tensor(a!) logits, Tensor grad, Tensor actions, Tensor? mask, Tensor row_stats, float temperature, float softcap) -> ()");
  m.def("token_log_ratios(Tensor logits, Tensor ref_logits, Tensor actions, Tensor? mask, float temperature, float softcap) -> (Tensor, Tensor)");
  m.def("token_stats(Tensor logits, Tensor actions, Tensor? ref_logits, Tensor? mask, float temperature, float softcap) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("q_values(Tensor logits, Tensor ref_logits, Tensor values, float tau, float temperature, float softcap) -> Tensor");
  m.def("boltzmann_values(Tensor q, Tensor ref_logits, float tau, float temperature, float softcap) -> Tensor");
  m.def("lambda_returns(Tensor log_ratios, Tensor values, Tensor rewards, float tau, float gamma, float lam, Tensor? lam_rows, float alpha, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, Tensor? trace) -> (Tensor, Tensor, Tensor)");
  m.def("gae(Tensor rewards, Tensor values, float gamma, float lam, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap) -> (Tensor, Tensor)");
  m.def("klq_targets(Tensor logits, Tensor actions, Tensor values, Tensor rewards, Tensor? ref_logits, Tensor? ref_logprobs, float tau, float gamma, float lam, Tensor? lam_rows, float alpha, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, float temperature, float softcap) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("klq_loss(Tensor logits, Tensor actions, Tensor values, Tensor ref_logprobs, Tensor returns, float tau, Tensor? mask, Tensor? weights, Tensor? normalizer, float temperature, float softcap, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("klq_loss_(Tensor(a!) logits, Tensor actions, Tensor values, Tensor ref_logprobs, Tensor returns, float tau, Tensor? mask, Tensor? weights, Tensor? normalizer, float temperature, float softcap) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("klq_loss_backward_(Tensor(a!) dlogits, Tensor unscale, Tensor upstream) -> ()");
  m.def("compact_tokens(Tensor mask, SymInt size) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_rows_(Tensor hidden, Tensor weight, Tensor? bias, Tensor actions, Tensor? mask, float temperature, float softcap, bool entropy, Tensor(a!)? out) -> (Tensor, Tensor, Tensor)");
  m.def("linear_dlogits_(Tensor(a!) out, Tensor hidden, Tensor weight, Tensor? bias, Tensor actions, Tensor scale, Tensor own, Tensor reference, float temperature, float softcap) -> ()");
  m.def("linear_hidden_(Tensor(a!) out, Tensor dlogits, Tensor weight, Tensor? scale) -> ()");
  m.def("linear_weight_(Tensor(a!) out, Tensor dlogits, Tensor hidden, bool add, Tensor? slots, Tensor? extra) -> ()");
  m.def("linear_chosen_(Tensor(a!)? out, Tensor(b!) slots, Tensor hidden, Tensor actions, Tensor scale, Tensor own, bool apart, Tensor(c!)? bias) -> ()");
  m.def("klq_loss_tokens(Tensor logprobs, Tensor values, Tensor ref_logprobs, Tensor returns, float tau, Tensor? mask, Tensor? weights, Tensor normalizer) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("place_scores(Tensor scores, Tensor mask, Tensor? cu_seqlens) -> Tensor");
}
