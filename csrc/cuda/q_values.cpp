// SPDX-License-Identifier: Apache-2.0
#include "cuda/q_values.h"

#include "cuda/row_glue.h"

namespace klq::cuda {
namespace {

Tensor q_values(Tensor logits, Tensor ref_logits, Tensor values, double tau, double temperature,
                double softcap) {
  const char* op = "q_values";
  const OnDeviceOf guard(op, "logits", logits);
  const Rows rows = rows_of(op, logits), ref = rows_like(op, ref_logits, logits, rows);
  const Array<float> v(op, "values", values, ScalarType::Float, logits, rows.count);
  Tensor q = new_floats(logits, logits.sizes());
  STD_CUDA_CHECK(q_value_rows(rows, ref, {temperature, softcap}, float(tau), v.data, floats(q),
                              current_stream(logits)));
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("q_values", TORCH_BOX(&q_values)); }

}  // namespace klq::cuda
