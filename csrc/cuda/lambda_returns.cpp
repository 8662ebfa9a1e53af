// SPDX-License-Identifier: Apache-2.0
#include "cuda/sequences.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> lambda_returns(
    const Tensor& log_ratios, const Tensor& values, const Tensor& rewards, double tau, double gamma,
    double lam, const MaybeTensor& lam_rows, double alpha, const MaybeTensor& mask,
    const MaybeTensor& cu_seqlens, const MaybeTensor& bootstrap, const MaybeTensor& trace) {
  const OnDeviceOf guard("lambda_returns", "values", values);
  Tensor q = new_floats(values), a = new_floats(values), g = new_floats(values);
  run_scan("lambda_returns",
           {log_ratios, values, rewards, lam_rows, mask, cu_seqlens, bootstrap, trace, tau, gamma,
            lam, alpha},
           &q, a, g);
  return {q, a, g};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("lambda_returns", TORCH_BOX(&lambda_returns)); }

}  // namespace klq::cuda
