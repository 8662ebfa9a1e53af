// SPDX-License-Identifier: Apache-2.0
// The matrix product of Hopper (sm_90a): C = A B^T in float32, of 16-bit A and B, an epilogue
// taking C out of registers. A and B each lie in memory with their depth along rows, or across.
//
// Persistent blocks of three warpgroups. One thread of the first keeps a ring of stages filled,
// each 64 deep, by the copy engine; the other two warpgroups multiply and take tiles in turns, so
// that one's epilogue runs under the other's products. The blocks of a cluster work on tiles below
// each other and share what they load of B.
//
// Tilings measured and dropped (H100 at its power limit, 2026-11-25; times over cuBLAS at 8192 x
// 4096 x 128256, 16384 x 2048 x 50304 and 16384 x 2048 x 151936, row sums only): a tile of 128 x
// 256 shared by both warpgroups 1.03, 1.04 and 1.06; 256 x 128 0.95, 1.04 and 1.09; one behind the
// other by two or three stages 0.95 to 1.06; without a cluster 1.25 and more. This one: 0.94.
#pragma once
#include <algorithm>
#include <atomic>

#include "cuda/row_launch.cuh"
#include "cuda/tensor_copy.cuh"
#include "cuda/wgmma.cuh"

namespace klq::cuda {

// A warpgroup's tile has BLOCKS x 64 rows and COLS columns; a cluster spans CLUSTER tiles down.
// A_ACROSS, B_ACROSS: memory holds A^T, B^T.
template <int BLOCKS, int COLS, int STAGES, int CLUSTER, bool A_ACROSS = false,
          bool B_ACROSS = false>
struct Tiling {
  static constexpr bool kAAcross = A_ACROSS, kBAcross = B_ACROSS;
  static constexpr int kBlocks = BLOCKS, kCols = COLS, kStages = STAGES, kCluster = CLUSTER;
  static constexpr int kRows = 64 * BLOCKS, kDepth = 64, kThreads = 384;
  static constexpr int kABytes = kRows * 128, kStageBytes = kABytes + COLS * 128;
  // of the producer's threads and of the others', which together are the 168 each begins with
  static constexpr int kLoadRegisters = 24, kMathRegisters = 240;
  static constexpr int kStagingBytes = 2048;  // for the epilogue of each of the 8 warps
  static constexpr int kBytes = STAGES * kStageBytes + 8 * kStagingBytes + 1024;
  // of B, loaded by one block for all: columns, or of boxes of 64 columns so much of the depth
  static constexpr int kSharedCols = COLS / CLUSTER, kSharedDepth = kDepth / CLUSTER;
  static_assert(CLUSTER > 1 && COLS % CLUSTER == 0);
  static_assert(kSharedCols % 8 == 0 && kSharedCols <= 256 && kRows <= 256);
  static_assert(!B_ACROSS || (COLS % 64 == 0 && kSharedDepth % 8 == 0));
};

// The order of tiles: strips of `strip` clusters down, each from left to right, so that what is in
// work at a time shares rows of A and of B that fit L2.
struct Raster {
  int down, across;  // clusters
  int strip;

  __device__ __forceinline__ int count() const { return down * across; }
  __device__ __forceinline__ void place(int t, int* m, int* n) const {
    const int first = t / (strip * across) * strip, left = t - first * across;
    const int height = min(strip, down - first);
    *m = first + left % height, *n = left / height;
  }
};

struct Product {
  CUtensorMap a, b;
  int depth;  // in stages
  Raster raster;
};

// A stage of the ring, and the parity of its present use.
template <int STAGES>
struct Slot {
  uint32_t index = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
  __device__ __forceinline__ void skip(uint32_t n) {
    index += n;
    parity ^= index / STAGES & 1;
    index %= STAGES;
  }
};

// At another block's barrier. No data of this thread's goes with it, only that the matrix units are
// done reading: asked for as a release to the cluster it would be a fence of all memory, every
// time.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t mapped) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define KLQ_HOPPER 1
#else
#define KLQ_HOPPER 0
#endif

// An Epilogue is what becomes of C:
//   wanted()   optional, the same for all threads: whether there is anything to do at all
//   finish(c, row, column, staging, lane)   by warps, each for 16 rows of C
template <class Tile, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_kernel(const __grid_constant__ Product p, const __grid_constant__ Epilogue epilogue) {
#if KLQ_HOPPER
  constexpr int kStages = Tile::kStages, kCluster = Tile::kCluster;
  if constexpr (requires { epilogue.wanted(); })
    if (!epilogue.wanted()) return;
  extern __shared__ uint8_t dynamic[];
  // static, so that the launcher sees whether the kernel was built for sm_90a
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t stages = (shared_address(dynamic) + 1023) & ~1023u;
  const uint32_t full = shared_address(barriers), empty = full + 8 * kStages;
  const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), lane = threadIdx.x % 32;
  const int rank = int(cluster_rank());
  const int first = int(blockIdx.x) / kCluster, step = int(gridDim.x) / kCluster;
  const int tiles = p.raster.count();
  auto rows_and_columns = [&](int t, int* row, int* column) {
    int m, n;
    p.raster.place(t, &m, &n);
    *row = (m * kCluster + rank) * Tile::kRows;
    *column = n * Tile::kCols;
  };

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, kCluster * 4);
    }
    barrier_fence_init();
    prefetch_map(p.a), prefetch_map(p.b);
  }
  __syncthreads();
  cluster_sync();

  if (warpgroup == 0) {
    give_registers<Tile::kLoadRegisters>();
    if (threadIdx.x == 0) {
      const uint64_t policy = normal_policy();
      constexpr uint16_t kAll = (1 << kCluster) - 1;
      Slot<kStages> slot;
      for (int t = first; t < tiles; t += step) {
        int row, column;
        rows_and_columns(t, &row, &column);
        for (int k = 0; k < p.depth; ++k, slot.next()) {
          const uint32_t at = stages + slot.index * Tile::kStageBytes, bar = full + 8 * slot.index;
          barrier_wait(empty + 8 * slot.index, slot.parity ^ 1);
          barrier_expect(bar, Tile::kStageBytes);
          const int depth = k * Tile::kDepth;
          if constexpr (Tile::kAAcross)
            for (int i = 0; i < Tile::kBlocks; ++i)
              load_box<false>(at + i * 8192, p.a, depth, row + 64 * i, bar, 0, policy);
          else
            load_box<false>(at, p.a, row, depth, bar, 0, policy);
          const uint32_t b = at + Tile::kABytes;
          if constexpr (Tile::kBAcross) {
            const int part = rank * Tile::kSharedDepth;
            for (int j = 0; j < Tile::kCols / 64; ++j)
              load_box<true>(b + j * 8192 + part * 128, p.b, depth + part, column + 64 * j, bar,
                             kAll, policy);
          } else {
            const int part = rank * Tile::kSharedCols;
            load_box<true>(b + part * 128, p.b, column + part, depth, bar, kAll, policy);
          }
        }
      }
    }
    __syncwarp();
  } else {
    take_registers<Tile::kMathRegisters>();
    const int consumer = warpgroup - 1, warp = int(threadIdx.x) / 32 % 4;
    // lane l tells the l-th block of the cluster, which loads into this one, that a stage is free
    const uint32_t free = lane < kCluster ? in_block(empty, lane) : 0;
    auto release = [&](uint32_t stage) {
      __syncwarp();
      if (lane < kCluster) barrier_arrive_remote(free + 8 * stage);
    };
    const uint32_t staging =
        stages + kStages * Tile::kStageBytes + (consumer * 4 + warp) * Tile::kStagingBytes;
    float c[Tile::kBlocks][Tile::kCols / 2];
    Slot<kStages> slot;
    auto multiply = [&](bool first_of_tile) {
      const uint32_t at = stages + slot.index * Tile::kStageBytes;
      constexpr bool kA = Tile::kAAcross, kB = Tile::kBAcross;
      constexpr int kStepA = kA ? 128 : 2, kStepB = kB ? 128 : 2;  // a depth of 16
      const uint64_t a = matrix_at<kA>(at), b = matrix_at<kB>(at + Tile::kABytes);
      barrier_wait(full + 8 * slot.index, slot.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < Tile::kDepth / 16; ++k)
#pragma unroll
        for (int i = 0; i < Tile::kBlocks; ++i)
          wgmma<kA, kB>(c[i], a + k * kStepA + i * (8192 / 16), b + k * kStepB,
                        k > 0 || !first_of_tile);
      wgmma_commit();
    };
    // They multiply one after the other: the barriers of the ring tell a stage's use from the one
    // before, not from the one before that, so nobody may run ahead of a whole tile.
    auto wait_for_turn = [&] {
      if (consumer == 0)
        asm volatile("bar.sync 2, 256;" ::: "memory");
      else
        asm volatile("bar.sync 3, 256;" ::: "memory");
    };
    auto pass_turn = [&] {
      if (consumer == 0)
        asm volatile("bar.arrive 3, 256;" ::: "memory");
      else
        asm volatile("bar.arrive 2, 256;" ::: "memory");
    };
    if (consumer == 1) pass_turn();
    int turn = 0;
    for (int t = first; t < tiles; t += step, ++turn) {
      if (turn % 2 != consumer) {
        slot.skip(p.depth);
        continue;
      }
      int row, column;
      rows_and_columns(t, &row, &column);
      row += warp * 16;
      wait_for_turn();
      multiply(true);
      uint32_t before = slot.index;
      slot.next();
      for (int k = 1; k < p.depth; ++k) {
        multiply(false);
        wgmma_wait<1>();  // the stage before this one has been read
        release(before);
        before = slot.index;
        slot.next();
      }
      pass_turn();
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < Tile::kBlocks; ++i) settle(c[i]);
      release(before);
#pragma unroll
      for (int i = 0; i < Tile::kBlocks; ++i)
        epilogue.finish(c[i], row + 64 * i, column, staging, lane);
    }
    if (lane == 0) stores_done();
    __syncwarp();
  }
  // no block leaves while another may still write into its shared memory
  cluster_sync();
#endif
}

// How many clusters of the kernel the device holds at once; 0: it was not built for it.
template <class Tile, class Epilogue>
cudaError_t prepare_gemm(int* clusters) {
  auto kernel = gemm_kernel<Tile, Epilogue>;
  static std::atomic<int> known[kMaxDevices];
  Device device;
  if (cudaError_t e = this_device(&device)) return e;
  if ((*clusters = known[device.id])) return cudaSuccess;
  cudaFuncAttributes found{};
  if (cudaError_t e = cudaFuncGetAttributes(&found, kernel)) return e;
  if (device.major != 9 || found.sharedSizeBytes == 0) return cudaErrorNotSupported;
  constexpr auto kShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaError_t e = cudaFuncSetAttribute(kernel, kShared, Tile::kBytes)) return e;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(Tile::kCluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(Tile::kCluster);
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = Tile::kBytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  if (cudaError_t e = cudaOccupancyMaxActiveClusters(clusters, kernel, &config)) return e;
  if (*clusters < 1) return cudaErrorNotSupported;
  known[device.id] = *clusters;
  return cudaSuccess;
}

// C = A B^T of a [rows, depth] and b [columns, depth], or where they lie across the other way
// round.
template <class Tile, class Epilogue>
cudaError_t launch_gemm(const Matrix& a, const Matrix& b, const Epilogue& epilogue,
                        cudaStream_t stream) {
  auto kernel = gemm_kernel<Tile, Epilogue>;
  int clusters = 0;
  if (cudaError_t e = prepare_gemm<Tile, Epilogue>(&clusters)) return e;
  auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  constexpr bool kA = Tile::kAAcross, kB = Tile::kBAcross;
  const int64_t rows = kA ? a.columns : a.rows, depth = kA ? a.rows : a.columns;
  const int64_t down = ceil_div(rows, Tile::kRows * Tile::kCluster);
  const int64_t across = ceil_div(kB ? b.columns : b.rows, Tile::kCols);
  constexpr int64_t kLimit = (int64_t(1) << 31) - 4096;  // what epilogues reckon with is 32-bit
  if (rows >= kLimit || depth >= kLimit || across * Tile::kCols >= kLimit ||
      down * across >= kLimit)
    return cudaErrorInvalidValue;
  Product p{};
  if (cudaError_t e = map_boxes(&p.a, a, kA ? Tile::kDepth : Tile::kRows, 64)) return e;
  constexpr int kShared = kB ? Tile::kSharedDepth : Tile::kSharedCols;
  if (cudaError_t e = map_boxes(&p.b, b, kShared, 64)) return e;
  p.depth = int(ceil_div(depth, Tile::kDepth));
  // as many rows of A as 16 MiB hold, but 8 clusters at least: those at work are then about as many
  // down as across
  const int64_t bytes = Tile::kRows * Tile::kCluster * depth * 2;
  const int64_t strip = std::max<int64_t>((int64_t(16) << 20) / bytes, 8);
  p.raster = {int(down), int(across), int(std::clamp<int64_t>(strip, 1, down))};
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(Tile::kCluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::min<int64_t>(clusters, down * across)) * Tile::kCluster);
  config.blockDim = dim3(Tile::kThreads);
  config.dynamicSmemBytes = Tile::kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, epilogue);
}

}  // namespace klq::cuda
