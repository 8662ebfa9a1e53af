// SPDX-License-Identifier: Apache-2.0
#include "cpu/q_values.h"

#include "cpu/glue.h"

namespace klq {
namespace {

Tensor q_values(Tensor logits, Tensor ref_logits, Tensor values, double tau, double temperature,
                double softcap) {
  const char* op = "q_values";
  const Rows rows = rows_of(op, logits), ref = rows_of(op, ref_logits);
  KLQ_CHECK(op, ref.count == rows.count && ref.width == rows.width,
            "ref_logits must have the shape of logits");
  const Scaling scaling{temperature, softcap};
  const bool wide = is_double(logits) || is_double(ref_logits) || is_double(values);
  return with_precision(wide, [&](auto w) {
    using W = decltype(w);
    const auto v = reals<W>(op, "values", values, rows.count);
    Tensor out = new_rows(logits, scalar_type<W>);
    W* q = data<W>(out);
    for_rows(rows, [&](int64_t i) {
      q_row(Row<W>(rows, i, scaling), Row<W>(ref, i, scaling), tau, v[i], q + i * rows.width);
    });
    return out;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CPU, m) { m.impl("q_values", TORCH_BOX(&q_values)); }

}  // namespace klq
