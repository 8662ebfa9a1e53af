// SPDX-License-Identifier: Apache-2.0
// The matrix product of Hopper (sm_90a): C = A B^T in float32, of 16-bit A and B, an epilogue
// taking C out of registers.
//
// Persistent blocks of three warpgroups. One thread of the first keeps a ring of stages filled,
// each 64 deep, by the copy engine; the other two warpgroups multiply. They either share a tile,
// half of its rows each, or take tiles in turns, so that one's epilogue runs under the other's
// products. The blocks of a cluster work on neighbouring tiles and share what they load.
#pragma once
#include <algorithm>
#include <atomic>

#include "cuda/row_launch.cuh"
#include "cuda/tensor_copy.cuh"
#include "cuda/wgmma.cuh"

namespace klq::cuda {

// BLOCKS x 64 rows and COLS columns for a warpgroup; TURNS: a tile each. A cluster spans CLUSTER_M
// tiles down and CLUSTER_N across. A_ACROSS: A lies [depth, rows], not [rows, depth]; B likewise.
// LAG: where a tile is shared, how many stages the second warpgroup is behind, so that each has the
// matrix units to itself for part of the other's epilogue.
template <int BLOCKS, int COLS, bool TURNS, int STAGES, int CLUSTER_M, int CLUSTER_N,
          int STAGING = 1, bool A_ACROSS = false, bool B_ACROSS = false, int LAG = 0>
struct Tiling {
  static constexpr int kBlocks = BLOCKS, kCols = COLS, kStages = STAGES;
  static constexpr int kClusterM = CLUSTER_M, kClusterN = CLUSTER_N;
  static constexpr int kCluster = CLUSTER_M * CLUSTER_N;
  static constexpr bool kTurns = TURNS, kAAcross = A_ACROSS, kBAcross = B_ACROSS;
  static constexpr int kRowsEach = 64 * BLOCKS, kRows = TURNS ? kRowsEach : 2 * kRowsEach;
  static constexpr int kDepth = 64, kThreads = 384, kLag = LAG;
  static_assert(LAG == 0 || (!TURNS && LAG > 1 && LAG < STAGES));
  static constexpr int kABytes = kRows * 128, kStageBytes = kABytes + COLS * 128;
  // of the producer's threads and of the others', which together are the 168 each begins with
  static constexpr bool kTight = BLOCKS * COLS / 2 > 128 && !A_ACROSS && !B_ACROSS;
  static constexpr int kLoadRegisters = kTight ? 24 : 40, kMathRegisters = kTight ? 240 : 232;
  // for the epilogue: buffers of 16 rows of 128 bytes, for each of the 8 warps
  static constexpr int kStaging = STAGING, kStagingBytes = STAGING * 2048;
  static constexpr int kBytes = STAGES * kStageBytes + 8 * kStagingBytes + 1024;
  // blocks whose loads reach this one, itself included
  static constexpr int kPeers = CLUSTER_M + CLUSTER_N - 1;
  static constexpr int kArrivals = kPeers * 4 * (TURNS ? 1 : 2);
};

// What a stage holds of one operand: EXTENT rows of it, 64 deep, loaded in PARTS by as many blocks.
template <int EXTENT, bool ACROSS, int PARTS>
struct Operand {
  static constexpr int kBoxes = ACROSS ? EXTENT / 64 : 1;
  static constexpr int kBoxRows = (ACROSS ? 64 : EXTENT) / PARTS;
  static constexpr int kStep = (ACROSS ? 2048 : 32) / 16;  // 16 deeper, in a matrix_at
  static_assert(kBoxRows % 8 == 0 && kBoxRows <= 256 && EXTENT % 64 == 0);

  static __device__ __forceinline__ void load(uint32_t to, const CUtensorMap& map, int row,
                                              int depth, int part, uint32_t bar, uint16_t mask,
                                              uint64_t policy) {
    const int skip = part * kBoxRows;
    to += skip * 128;
#pragma unroll
    for (int k = 0; k < kBoxes; ++k)
      load_box<(PARTS > 1)>(to + k * 8192, map, ACROSS ? depth + skip : row + skip,
                            ACROSS ? row + 64 * k : depth, bar, mask, policy);
  }
  static cudaError_t encode(CUtensorMap* map, const Matrix& m) {
    return map_boxes(map, m, kBoxRows, 64);
  }
};
template <class Tile>
using OperandA = Operand<Tile::kRows, Tile::kAAcross, Tile::kClusterN>;
template <class Tile>
using OperandB = Operand<Tile::kCols, Tile::kBAcross, Tile::kClusterM>;

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
  Keep keep_a, keep_b;
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
template <class T, class Tile, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    gemm_kernel(const __grid_constant__ Product p, const __grid_constant__ Epilogue epilogue) {
#if KLQ_HOPPER
  constexpr int kStages = Tile::kStages, kClusterM = Tile::kClusterM, kClusterN = Tile::kClusterN;
  using A = OperandA<Tile>;
  using B = OperandB<Tile>;
  if constexpr (requires { epilogue.wanted(); })
    if (!epilogue.wanted()) return;
  extern __shared__ uint8_t dynamic[];
  // static, so that the launcher sees whether the kernel was built for sm_90a
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t stages = (shared_address(dynamic) + 1023) & ~1023u;
  const uint32_t full = shared_address(barriers), empty = full + 8 * kStages;
  const int warpgroup = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), lane = threadIdx.x % 32;
  const int rank = Tile::kCluster == 1 ? 0 : int(cluster_rank());
  const int rank_m = rank % kClusterM, rank_n = rank / kClusterM;
  const int first = int(blockIdx.x) / Tile::kCluster, step = int(gridDim.x) / Tile::kCluster;
  const int tiles = p.raster.count();
  auto rows_and_columns = [&](int t, int* row, int* column) {
    int m, n;
    p.raster.place(t, &m, &n);
    *row = (m * kClusterM + rank_m) * Tile::kRows;
    *column = (n * kClusterN + rank_n) * Tile::kCols;
  };

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, Tile::kArrivals);
    }
    barrier_fence_init();
    prefetch_map(p.a), prefetch_map(p.b);
  }
  __syncthreads();
  if (Tile::kCluster > 1) cluster_sync();

  if (warpgroup == 0) {
    give_registers<Tile::kLoadRegisters>();
    if (threadIdx.x == 0) {
      const uint64_t policy_a = cache_policy(p.keep_a), policy_b = cache_policy(p.keep_b);
      uint16_t to_a = 0, to_b = 0;  // blocks with the same rows; with the same columns
      for (int n = 0; n < kClusterN; ++n) to_a |= uint16_t(1 << (rank_m + kClusterM * n));
      for (int m = 0; m < kClusterM; ++m) to_b |= uint16_t(1 << (m + kClusterM * rank_n));
      Slot<kStages> slot;
      for (int t = first; t < tiles; t += step) {
        int row, column;
        rows_and_columns(t, &row, &column);
        for (int k = 0; k < p.depth; ++k, slot.next()) {
          const uint32_t at = stages + slot.index * Tile::kStageBytes, bar = full + 8 * slot.index;
          barrier_wait(empty + 8 * slot.index, slot.parity ^ 1);
          barrier_expect(bar, Tile::kStageBytes);
          A::load(at, p.a, row, k * Tile::kDepth, rank_n, bar, to_a, policy_a);
          B::load(at + Tile::kABytes, p.b, column, k * Tile::kDepth, rank_m, bar, to_b, policy_b);
        }
      }
    }
    __syncwarp();
  } else {
    take_registers<Tile::kMathRegisters>();
    const int consumer = warpgroup - 1, warp = int(threadIdx.x) / 32 % 4;
    // lane l tells the l-th of the blocks that load into this one that a stage is free
    int peer = lane < kClusterN ? rank_m + kClusterM * lane : lane - kClusterN;
    if (lane >= kClusterN) peer = peer + (peer >= rank_m) + kClusterM * rank_n;
    const uint32_t free = lane < Tile::kPeers ? in_block(empty, peer) : 0;
    auto release = [&](uint32_t stage) {
      __syncwarp();
      if (Tile::kCluster == 1) {
        if (lane == 0) barrier_arrive(empty + 8 * stage);
      } else if (lane < Tile::kPeers) {
        barrier_arrive_remote(free + 8 * stage);
      }
    };
    const uint32_t staging =
        stages + kStages * Tile::kStageBytes + (consumer * 4 + warp) * Tile::kStagingBytes;
    const uint32_t own = Tile::kTurns ? 0 : consumer * Tile::kRowsEach;  // rows before its own
    float c[Tile::kBlocks][Tile::kCols / 2];
    Slot<kStages> slot;
    // with fewer stages the first could be a tile ahead
    const bool lags = Tile::kLag > 0 && p.depth >= 2 * kStages;
    auto multiply = [&](bool first_of_tile) {
      const uint32_t at = stages + slot.index * Tile::kStageBytes;
      const uint64_t a = matrix_at<Tile::kAAcross>(at + own * 128);
      const uint64_t b = matrix_at<Tile::kBAcross>(at + Tile::kABytes);
      barrier_wait(full + 8 * slot.index, slot.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < Tile::kDepth / 16; ++k)
#pragma unroll
        for (int i = 0; i < Tile::kBlocks; ++i)
          wgmma<T, Tile::kAAcross, Tile::kBAcross>(c[i], a + k * A::kStep + i * (8192 / 16),
                                                   b + k * B::kStep, k > 0 || !first_of_tile);
      wgmma_commit();
    };
    // Those who take turns multiply one after the other: the barriers of the ring tell a stage's
    // use from the one before, not from the one before that, so nobody may run ahead of a whole
    // tile.
    auto wait_for_turn = [&] {
      if (!Tile::kTurns) return;
      if (consumer == 0)
        asm volatile("bar.sync 2, 256;" ::: "memory");
      else
        asm volatile("bar.sync 3, 256;" ::: "memory");
    };
    auto pass_turn = [&] {
      if (!Tile::kTurns) return;
      if (consumer == 0)
        asm volatile("bar.arrive 3, 256;" ::: "memory");
      else
        asm volatile("bar.arrive 2, 256;" ::: "memory");
    };
    if (consumer == 1) pass_turn();
    int turn = 0;
    for (int t = first; t < tiles; t += step, ++turn) {
      if (Tile::kTurns && turn % 2 != consumer) {
        slot.skip(p.depth);
        continue;
      }
      int row, column;
      rows_and_columns(t, &row, &column);
      row += own + warp * 16;
      if (lags && consumer == 1) asm volatile("bar.sync 1, 256;" ::: "memory");
      wait_for_turn();
      multiply(true);
      uint32_t before = slot.index;
      slot.next();
      for (int k = 1; k < p.depth; ++k) {
        multiply(false);
        if (lags && consumer == 0 && k == Tile::kLag - 1)
          asm volatile("bar.arrive 1, 256;" ::: "memory");
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
        epilogue.template finish<Tile>(c[i], row + 64 * i, column, staging, lane);
    }
    if (lane == 0) stores_done();
    __syncwarp();
  }
  // no block leaves while another may still write into its shared memory
  if (Tile::kCluster > 1) cluster_sync();
#endif
}

// How many clusters of the kernel the device holds at once; 0: it was not built for it.
template <class T, class Tile, class Epilogue>
cudaError_t prepare_gemm(int* clusters) {
  auto kernel = gemm_kernel<T, Tile, Epilogue>;
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

// How far a launch departs from what is chosen by itself; for measurements.
struct Tuning {
  int strip = 0;  // 0: as many rows of A as 16 MiB hold, 8 clusters at least
  Keep keep_a = Keep::normal, keep_b = Keep::normal;
};

// C = A B^T; a and b as they lie: [rows, depth], or [depth, rows] where the tiling says so.
template <class T, class Tile, class Epilogue>
cudaError_t launch_gemm(const Matrix& a, const Matrix& b, const Epilogue& epilogue,
                        cudaStream_t stream, const Tuning& tuning = {}) {
  auto kernel = gemm_kernel<T, Tile, Epilogue>;
  int clusters = 0;
  if (cudaError_t e = prepare_gemm<T, Tile, Epilogue>(&clusters)) return e;
  const int64_t rows = Tile::kAAcross ? a.columns : a.rows;
  const int64_t columns = Tile::kBAcross ? b.columns : b.rows;
  const int64_t depth = Tile::kAAcross ? a.rows : a.columns;
  auto ceil_div = [](int64_t x, int64_t y) { return (x + y - 1) / y; };
  const int64_t down = ceil_div(rows, Tile::kRows * Tile::kClusterM);
  const int64_t across = ceil_div(columns, Tile::kCols * Tile::kClusterN);
  if (down * across >= int64_t(1) << 31) return cudaErrorInvalidValue;
  Product p{};
  if (cudaError_t e = OperandA<Tile>::encode(&p.a, a)) return e;
  if (cudaError_t e = OperandB<Tile>::encode(&p.b, b)) return e;
  p.depth = int(ceil_div(depth, Tile::kDepth));
  constexpr int64_t kSquare = 8;  // the clusters at work are about as many down as across
  const int64_t bytes = Tile::kRows * Tile::kClusterM * depth * 2;  // of A, for a row of clusters
  const int64_t strip =
      tuning.strip ? tuning.strip : std::max((int64_t(16) << 20) / bytes, kSquare);
  p.raster = {int(down), int(across), int(std::clamp<int64_t>(strip, 1, down))};
  p.keep_a = tuning.keep_a, p.keep_b = tuning.keep_b;
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
