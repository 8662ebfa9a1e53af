// SPDX-License-Identifier: Apache-2.0
// Chooses and launches the row kernel for a shape: ring or stream, and how a row is cut. Chosen
// from widths and types only, never from how many rows there are, so that a row gives the same bits
// alone and in a batch; and all passes without a gradient cut a row alike, so that a log-prob has
// the same bits from every op.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/row_ring.cuh"
#include "cuda/row_stream.cuh"

namespace klq::cuda {

// A row op's rows: what it reads, and where a gradient goes.
struct RowSet {
  Rows rows;
  const Rows* ref = nullptr;
  const Rows* out = nullptr;
  ActiveRows active;
};

inline bool same_type(const Rows& a, const Rows* b) { return !b || a.type == b->type; }

// A kernel made ready for one device, once.
struct RingKernel {
  bool usable = false;   // built for an architecture that has bulk copies, and it fits
  int clusters[9] = {};  // how many clusters of a size the device holds at once
};

template <class T, bool CAPPED, class Op, bool CLUSTERED, class Shape>
cudaError_t prepare_ring(const Device& device, RingKernel* k) {
  auto kernel = row_ring_kernel<T, CAPPED, Op, CLUSTERED, Shape>;
  cudaFuncAttributes found{};
  if (cudaError_t e = cudaFuncGetAttributes(&found, kernel)) return e;
  k->usable = found.ptxVersion >= 90 &&
              int64_t(found.sharedSizeBytes) + Shape::kBytes <= int64_t(device.shared);
  if (!k->usable) return cudaSuccess;
  constexpr auto kShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, kShared, Shape::kBytes)) return e;
  int blocks = 0;
  if (cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel,
                                                                    Shape::kThreads, Shape::kBytes))
    return e;
  k->clusters[1] = device.sms * blocks;
  for (int size = 2; CLUSTERED && size <= 8; size *= 2) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size);
    config.blockDim = dim3(Shape::kThreads);
    config.dynamicSmemBytes = Shape::kBytes;
    config.attrs = &cluster;
    config.numAttrs = 1;
    // processor groups whose size is no multiple of the cluster's hold fewer
    if (cudaOccupancyMaxActiveClusters(&k->clusters[size], kernel, &config)) {
      k->clusters[size] = 0;
      cudaGetLastError();
    }
  }
  return cudaSuccess;
}

template <class T, bool CAPPED, class Op, bool CLUSTERED, class Shape>
cudaError_t ring_kernel(const Device& device, RingKernel* out) {
  static RingKernel table[kMaxDevices];
  static bool ready[kMaxDevices];
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!ready[device.id]) {
    RingKernel made;
    if (cudaError_t e = prepare_ring<T, CAPPED, Op, CLUSTERED, Shape>(device, &made)) return e;
    table[device.id] = made;
    ready[device.id] = true;
  }
  *out = table[device.id];
  return cudaSuccess;
}

// Bytes that a block of log-probs alone takes before it makes room for the next, so that
// multiprocessors farther from memory get less to do. For all else, and over a list, whose length
// the host does not know, as many blocks as fit walk over all rows: a start costs more there than
// that saves, or was not measured (benchmarks/results/row_kernels.md).
constexpr int64_t kTake = 192 << 10;

// *done = false: this device or this build has no ring for the shape.
template <class T, bool CAPPED, class Op, bool CLUSTERED, class Shape>
cudaError_t launch_ring(const RowSet& set, const Scale& scale, const Op& op, int cluster,
                        const Device& device, cudaStream_t stream, bool* done) {
  RingKernel k;
  if (cudaError_t e = ring_kernel<T, CAPPED, Op, CLUSTERED, Shape>(device, &k)) return e;
  if (!k.usable || k.clusters[cluster] < 1) return cudaSuccess;
  Ring ring{};
  const int units = int((set.rows.width + Vec<T>::kWidth - 1) / Vec<T>::kWidth);
  ring.cluster = cluster;
  ring.slice = ((units + cluster - 1) / cluster + 7) / 8 * 8;  // whole 128-byte lines
  ring.chunks = std::max(1, (ring.slice + Shape::kStage - 1) / Shape::kStage);
  ring.keep = set.out && set.out->data == set.rows.data;
  if (Op::kGrad && ring.chunks > Shape::kStages) return cudaSuccess;
  int64_t clusters = k.clusters[cluster];
  if (Op::kSpread && !set.active.list) {
    const int64_t bytes = 16 * int64_t(ring.slice);
    const int64_t rows = std::max<int64_t>(1, (kTake + bytes / 2) / bytes);
    clusters = std::max(clusters, (set.rows.count + rows - 1) / rows);
  }
  clusters = std::min(clusters, set.rows.count);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(clusters * cluster));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = CLUSTERED;
  *done = true;
  return cudaLaunchKernelEx(&config, row_ring_kernel<T, CAPPED, Op, CLUSTERED, Shape>, set.rows,
                            set.ref ? *set.ref : Rows{}, set.out ? *set.out : Rows{}, set.active,
                            ring, scale, op);
}

template <int LANES>
unsigned stream_grid(const Rows& rows, const Device& device) {
  using G = RowGroup<LANES>;
  const int64_t blocks = (rows.count + G::kTogether - 1) / G::kTogether;
  return unsigned(std::min<int64_t>(blocks, int64_t(device.sms) * (2048 / G::kThreads)));
}

template <class Reader, bool CAPPED, class Op, int LANES>
cudaError_t launch_stream(const RowSet& set, const Scale& scale, const Op& op, const Device& device,
                          cudaStream_t stream) {
  const unsigned grid = stream_grid<LANES>(set.rows, device);
  row_stream_kernel<Reader, CAPPED, Op, LANES><<<grid, RowGroup<LANES>::kThreads, 0, stream>>>(
      set.rows, set.ref ? *set.ref : Rows{}, set.out ? *set.out : Rows{}, set.active, scale, op);
  return cudaGetLastError();
}

constexpr int64_t kWarpRow = 4 << 10;  // bytes: a row for one warp

template <class T>
struct Tag {
  using type = T;
};
template <int N>
using Lanes = std::integral_constant<int, N>;

// body(reader, lanes) with the reader and the threads a row for these rows
template <class Body>
cudaError_t with_reader(const Rows& rows, const Rows* ref, const Rows* out, const Body& body) {
  if (!same_type(rows, ref) || !same_type(rows, out)) return body(Tag<Elements>{}, Lanes<256>{});
  auto typed = [&](auto reader) {
    const int64_t bytes = rows.width * (rows.type == Type::f32 ? 4 : 2);
    return bytes <= kWarpRow ? body(reader, Lanes<32>{}) : body(reader, Lanes<256>{});
  };
  if (rows.type == Type::f32) return typed(Tag<Vectors<float>>{});
  return rows.type == Type::bf16 ? typed(Tag<Vectors<bf16>>{}) : typed(Tag<Vectors<f16>>{});
}

// *done = false: no ring for this shape or device.
template <class T, bool CAPPED, class Op>
cudaError_t try_ring(const RowSet& set, const Scale& scale, const Op& op, const Device& device,
                     cudaStream_t stream, bool* done) {
  const int64_t bytes = set.rows.width * int64_t(sizeof(T));
  if (bytes <= kShortRow) return cudaSuccess;  // its second read comes from L1
  // 64 registers, which leave room for three blocks, are too few for these
  constexpr bool kHeavy = CAPPED || Op::kHeavy || sizeof(T) == 4;
  if constexpr (!Op::kGrad) {
    auto run = [&](auto shape) {
      return launch_ring<T, CAPPED, Op, false, decltype(shape)>(set, scale, op, 1, device, stream,
                                                                done);
    };
    if constexpr (kHeavy)
      return run(RingShape<256, 0, 4, 6, 2>{});
    else
      return run(RingShape<256, 0, 4, 4, 3>{});
  } else {
    using Shape = RingShape<256, 256, 4, 13, 1>;
    // room for the row and for a quarter of it to be on its way
    const int64_t room = int64_t(Shape::kStages - 3) * Shape::kStage * 16;
    if (bytes <= room)
      return launch_ring<T, CAPPED, Op, false, Shape>(set, scale, op, 1, device, stream, done);
    int cluster = 2;
    while (cluster < 8 && bytes > room * cluster) cluster *= 2;
    return launch_ring<T, CAPPED, Op, true, Shape>(set, scale, op, cluster, device, stream, done);
  }
}

template <bool CAPPED, class Op>
cudaError_t launch(const RowSet& set, const Scale& scale, const Op& op, const Device& device,
                   cudaStream_t stream) {
  if (device.major >= 9 && same_type(set.rows, set.ref) && same_type(set.rows, set.out)) {
    bool done = false;
    auto ring = [&](auto t) {
      return try_ring<decltype(t), CAPPED>(set, scale, op, device, stream, &done);
    };
    const Type type = set.rows.type;
    const cudaError_t error = type == Type::f32    ? ring(float{})
                              : type == Type::bf16 ? ring(bf16{})
                                                   : ring(f16{});
    if (error || done) return error;
  }
  return with_reader(set.rows, set.ref, set.out, [&](auto reader, auto lanes) {
    return launch_stream<typename decltype(reader)::type, CAPPED, Op, lanes.value>(set, scale, op,
                                                                                   device, stream);
  });
}

template <class Op>
cudaError_t launch(const RowSet& set, Scaling scaling, const Op& op, cudaStream_t stream) {
  if (set.rows.count == 0) return cudaSuccess;
  Device device;
  if (cudaError_t e = this_device(&device)) return e;
  const Scale scale(scaling);
  return scaling.softcap > 0 ? launch<true>(set, scale, op, device, stream)
                             : launch<false>(set, scale, op, device, stream);
}

}  // namespace klq::cuda
