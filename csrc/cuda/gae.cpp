// SPDX-License-Identifier: Apache-2.0
// GAE is the scan of lambda_returns with Q = V and alpha = 1.
#include "cuda/sequences.h"

namespace klq::cuda {
namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, double gamma,
                               double lam, const MaybeTensor& mask, const MaybeTensor& cu_seqlens,
                               const MaybeTensor& bootstrap) {
  const OnDeviceOf guard("gae", "values", values);
  Tensor a = new_floats(values), g = new_floats(values);
  run_scan("gae",
           {std::nullopt, values, rewards, std::nullopt, mask, cu_seqlens, bootstrap, std::nullopt,
            0.0, gamma, lam, 1.0},
           nullptr, a, g);
  return {a, g};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(klq, CUDA, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace klq::cuda
