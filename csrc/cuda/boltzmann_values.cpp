// SPDX-License-Identifier: Apache-2.0
#include "cuda/q_values.h"
#include "cuda/row_glue.h"

namespace klq::cuda {
namespace {

Tensor boltzmann_values(Tensor q, Tensor ref_logits, double tau, double temperature,
                        double softcap) {
  const char* op = "boltzmann_values";
  const OnDeviceOf guard(op, "q", q);
  const Rows rows = rows_of(op, q), ref = rows_like(op, ref_logits, q, rows);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < q.dim(); ++d) shape.push_back(q.size(d));
  Tensor out = new_floats(q, shape);
  STD_CUDA_CHECK(boltzmann_rows(rows, ref, {temperature, softcap}, float(tau), floats(out),
                                current_stream(q)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) {
  m.impl("boltzmann_values", TORCH_BOX(&boltzmann_values));
}

}  // namespace klq::cuda
