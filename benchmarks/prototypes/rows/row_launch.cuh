// SPDX-License-Identifier: Apache-2.0
// Chooses and launches the row kernel for a shape: how many blocks share a row and how the ring of
// stages is cut. Chosen from shapes only, never from data, so equal shapes give equal bits.
#pragma once
#include <algorithm>

#include "cuda/row_ring.cuh"

namespace klq::cuda {

inline Scale scale_of(Scaling s) {
  Scale scale{float(s.temperature), float(1.0 / s.temperature), 0.0f, 0.0f};
  if (s.softcap > 0) scale.softcap = float(s.softcap), scale.inv_cap = float(1.0 / s.softcap);
  return scale;
}

template <class T, bool SCALED, class Op, int NC, int U, int STAGES, int CLUSTER>
cudaError_t launch_ring(Rows rows, const Scale& scale, const Op& op, int blocks_per_sm,
                        cudaStream_t stream) {
  constexpr int kStage = NC * U, kBytes = STAGES * kStage * 16;
  const int slice = (rows.max_body + CLUSTER - 1) / CLUSTER;
  rows.chunks = std::max(1, (slice + kStage - 1) / kStage);
  auto kernel = row_ring_kernel<T, SCALED, Op, NC, U, STAGES, CLUSTER>;
  int device = 0, sms = 0;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device))
    return e;
  if (cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes))
    return e;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {CLUSTER, 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(NC + 32);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = CLUSTER > 1;
  int clusters = sms * blocks_per_sm / CLUSTER;
  config.gridDim = dim3(clusters * CLUSTER);
  if (CLUSTER > 1) {  // processor groups whose size is no multiple of the cluster hold fewer
    int fit = 0;
    if (cudaError_t e = cudaOccupancyMaxActiveClusters(&fit, kernel, &config)) return e;
    clusters = std::min(clusters, std::max(1, fit));
  }
  clusters = int(std::min<int64_t>(clusters, rows.count));
  config.gridDim = dim3(clusters * CLUSTER);
  return cudaLaunchKernelEx(&config, kernel, rows, scale, op);
}

// Bytes of a row that one block of each configuration can hold with room to prefetch.
template <class T, bool SCALED, class Op>
cudaError_t launch_rows(Rows rows, Scaling scaling, const Op& op, cudaStream_t stream) {
  const Scale scale = scale_of(scaling);
  rows.max_body = int(rows.width / Vec<T>::kWidth);
  const int64_t bytes = int64_t(rows.max_body) * 16;
  if constexpr (!Op::kGrad)
    return launch_ring<T, SCALED, Op, 256, 2, 8, 1>(rows, scale, op, 3, stream);
  else if (bytes <= 72 << 10)
    return launch_ring<T, SCALED, Op, 256, 4, 6, 1>(rows, scale, op, 2, stream);
  else if (bytes <= 128 << 10)
    return launch_ring<T, SCALED, Op, 512, 2, 13, 1>(rows, scale, op, 1, stream);
  else if (bytes <= 320 << 10)
    return launch_ring<T, SCALED, Op, 512, 4, 6, 2>(rows, scale, op, 1, stream);
  else if (bytes <= 640 << 10)
    return launch_ring<T, SCALED, Op, 512, 4, 6, 4>(rows, scale, op, 1, stream);
  else if (bytes <= 1280 << 10)
    return launch_ring<T, SCALED, Op, 512, 4, 6, 8>(rows, scale, op, 1, stream);
  return cudaErrorInvalidValue;
}

template <class Op>
cudaError_t launch_typed(const Rows& rows, Scaling scaling, const Op& op, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  const bool scaled = scaling.softcap > 0 || scaling.temperature != 1;
  switch (rows.type) {
    case Type::f32:
      return scaled ? launch_rows<float, true>(rows, scaling, op, stream)
                    : launch_rows<float, false>(rows, scaling, op, stream);
    case Type::bf16:
      return scaled ? launch_rows<bf16, true>(rows, scaling, op, stream)
                    : launch_rows<bf16, false>(rows, scaling, op, stream);
    default:
      return scaled ? launch_rows<f16, true>(rows, scaling, op, stream)
                    : launch_rows<f16, false>(rows, scaling, op, stream);
  }
}

}  // namespace klq::cuda
