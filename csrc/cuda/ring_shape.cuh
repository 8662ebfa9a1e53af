// SPDX-License-Identifier: Apache-2.0
// The sizes of a ring (row_ring.cuh), and what its roles hand to one another beside the sums.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace klq::cuda {

constexpr int kSlots = 16;
constexpr int kShortRow = 16 << 10;  // bytes; rows up to here are not for the ring

// threads that sum, threads that write, vectors a summer takes of a stage, stages, blocks an SM
template <int SUM, int WRITE, int U, int STAGES, int BLOCKS>
struct RingShape {
  static constexpr int kSum = SUM, kWrite = WRITE, kUnroll = U, kStages = STAGES, kBlocks = BLOCKS;
  static constexpr int kStage = SUM * U;  // units of 16 bytes
  static constexpr int kThreads = SUM + WRITE + 64;
  // a copy keeps its place in the 128-byte line, so that lines arrive whole
  static constexpr int kPitch = kStage + 8;
  static constexpr int kBytes = STAGES * kPitch * 16;
  static constexpr int kRowsHeld = (STAGES - 2) / (kShortRow / (kStage * 16) + 1) + 2;
  static_assert(kStage % 8 == 0 && kStage % (WRITE ? WRITE : 1) == 0);
};

// The blocks an SM for which the compiler is asked to leave registers: not three on sm_100, where
// it would spill.
constexpr int blocks_asked(int blocks) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return blocks < 2 ? blocks : 2;
#else
  return blocks;
#endif
}

// How the rows spread over blocks: set by the launcher from shapes alone.
struct Ring {
  int cluster;  // blocks that share a row
  int slice;    // units of a row a block holds, at most
  int chunks;   // stages a slice takes
  bool keep;    // the row is written back where it was read
};

// Where a row's units lie: bytes into their 16, and those 16 in their line.
__device__ __forceinline__ int shift_of(const char* row) {
  return int(reinterpret_cast<uintptr_t>(row) & 15);
}
__device__ __forceinline__ int lead_of(const char* row) {
  return int(reinterpret_cast<uintptr_t>(row) >> 4 & 7);
}

// The elements before `end` that do not fill 16 bytes, from where these begin.
template <class T>
__device__ __forceinline__ uint4 row_end(const T* end) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const int count = int((reinterpret_cast<uintptr_t>(end) & 15) / sizeof(T));
  const Bits* from = reinterpret_cast<const Bits*>(end) - count;
  uint32_t w[4] = {};
#pragma unroll
  for (int e = 0; e < int(16 / sizeof(T)); ++e)
    if (e < count) w[e * sizeof(T) / 4] |= uint32_t(from[e]) << e * sizeof(T) % 4 * 8;
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// What the writers need of a closed row: its gradient is factor 2^exponent(y) dy/dz, and `chosen`
// at the chosen token.
struct RowGradient {
  float max, point, factor, chosen;
};

}  // namespace klq::cuda
