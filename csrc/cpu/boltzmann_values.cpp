// SPDX-License-Identifier: Apache-2.0
#include "cpu/boltzmann_values.h"

#include "cpu/glue.h"

namespace klq {
namespace {

Tensor boltzmann_values(Tensor q, Tensor ref_logits, double tau, double temperature,
                        double softcap) {
  const char* op = "boltzmann_values";
  const Rows rows = rows_of(op, q), ref = rows_of(op, ref_logits);
  KLQ_CHECK(op, ref.count == rows.count && ref.width == rows.width,
            "q must have the shape of ref_logits");
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < q.dim(); ++d) shape.push_back(q.size(d));
  return with_precision(is_double(q) || is_double(ref_logits), [&](auto w) {
    using W = decltype(w);
    Tensor out = torch::stable::new_empty(q, shape, scalar_type<W>);
    W* v = data<W>(out);
    for_rows(rows, [&](int64_t i) {
      v[i] = W(boltzmann_row(Row<W>(rows, i, Scaling{1, 0}),
                             Row<W>(ref, i, Scaling{temperature, softcap}), tau));
    });
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("boltzmann_values", TORCH_BOX(&boltzmann_values)); }

}  // namespace klq
