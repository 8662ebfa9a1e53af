// SPDX-License-Identifier: Apache-2.0
#include "cuda/klq_targets.h"

#include "cuda/row_glue.h"
#include "cuda/sequences.h"

namespace klq::cuda {
namespace {

// A small input as the scan inside the kernel wants it: float32, aligned for vectors.
struct Floats : Array<float> {
  Reals reals;

  Floats(const char* op, const char* name, const MaybeTensor& x, const Tensor& like, int64_t count)
      : Array(op, name, x, ScalarType::Float, like, count) {
    if (tensor && !aligned(16)) {
      tensor = torch::stable::clone(*tensor);
      data = static_cast<const float*>(tensor->data_ptr());
    }
    reals = {data, Type::f32, true};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> klq_targets(
    Tensor logits, Tensor actions, Tensor values, Tensor rewards, MaybeTensor ref_logits,
    MaybeTensor ref_logprobs, double tau, double gamma, double lam, MaybeTensor lam_rows,
    double alpha, MaybeTensor mask, MaybeTensor cu_seqlens, MaybeTensor bootstrap,
    double temperature, double softcap) {
  const char* op = "klq_targets";
  KLQ_CHECK(op, ref_logits.has_value() != ref_logprobs.has_value(),
            "exactly one of ref_logits and ref_logprobs is needed");
  const OnDeviceOf guard(op, "logits", logits);
  const cudaStream_t stream = current_stream(logits);
  const Rows rows = rows_of(op, logits);
  const Rows ref = ref_logits ? rows_like(op, *ref_logits, logits, rows) : Rows{};
  const int64_t n = rows.count;
  const SequencesInput seqs(op, actions, cu_seqlens);
  const int64_t per = seqs.per_sequence();
  const Array<int64_t> ids(op, "actions", actions, ScalarType::Long, logits, n);
  const Array<float> cached(op, "ref_logprobs", ref_logprobs, ScalarType::Float, logits, n);
  const Floats v(op, "values", values, logits, n), r(op, "rewards", rewards, logits, n);
  const Floats lams(op, "lam", lam_rows, logits, per),
      boot(op, "bootstrap", bootstrap, logits, per);
  const char* ends = static_cast<const char*>(seqs.seqs.ends);
  const void* last = ends ? ends + seqs.seqs.count * (seqs.seqs.wide_ends ? 8 : 4) : nullptr;
  const Mask use(op, mask, logits, n, stream, last, seqs.seqs.wide_ends);
  auto fresh = [&] { return new_floats(logits, actions.sizes()); };
  Tensor lp = fresh(), rp = fresh(), rho = fresh(), q = fresh(), a = fresh(), g = fresh();
  const Tensor arrived = new_on_device(logits, {&seqs.seqs.count, 1}, aoti_torch_dtype_int32());
  MaybeTensor mask_copy;
  TargetArgs t{};
  t.actions = ids.data, t.cached = cached.data;
  t.logprobs = floats(lp), t.ref_logprobs = floats(rp), t.log_ratios = floats(rho);
  t.arrived = static_cast<int32_t*>(arrived.data_ptr());
  t.scan.seqs = seqs.seqs;
  t.scan.log_ratios = {rho.data_ptr(), Type::f32, true};
  t.scan.values = v.reals, t.scan.rewards = r.reals;
  t.scan.lam_rows = lams.reals, t.scan.bootstrap = boot.reals;
  if (use.bits.data) {
    if (!use.bits.aligned(4)) mask_copy = torch::stable::clone(*use.bits.tensor);
    t.scan.mask = static_cast<const uint8_t*>(mask_copy ? mask_copy->data_ptr()
                                                        : use.bits.tensor->data_ptr());
  }
  t.scan.mask_vector = true;
  t.scan.tau = tau, t.scan.gamma = gamma, t.scan.lam = lam, t.scan.alpha = alpha;
  t.scan.q = floats(q), t.scan.advantages = floats(a), t.scan.returns = floats(g);
  STD_CUDA_CHECK(
      target_rows(rows, ref_logits ? &ref : nullptr, use.rows, {temperature, softcap}, t, stream));
  return {lp, rp, rho, q, a, g};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("klq_targets", TORCH_BOX(&klq_targets)); }

}  // namespace klq::cuda
