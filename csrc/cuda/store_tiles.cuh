// SPDX-License-Identifier: Apache-2.0
// A product's rows on their way out: from fragments through shared memory to the copy engine.
#pragma once
#include "cuda/gemm.cuh"

namespace klq::cuda {

// A matrix that warps fill 16 rows at a time.
template <class Out>
struct RowsOut {
  CUtensorMap map;
  int columns;

  static constexpr int kPiece = 64;  // columns in a box of 16 rows of 128 bytes
  static_assert(sizeof(Out) == 2);

  cudaError_t encode(const Matrix& m) {
    columns = int(m.columns);
    return map_boxes(&map, m, 16, kPiece);
  }

  // 128 bytes of each row at a time. The 16-byte units of a row lie in the copy engine's order:
  // unit u of row r at u ^ r % 8.
  template <int N>
  __device__ __forceinline__ void put(const float (&c)[N], int row, int column, uint32_t staging,
                                      int lane) const {
    const uint64_t policy = normal_policy();
#pragma unroll
    for (int piece = 0; piece < 2 * N / kPiece; ++piece) {
      if (column + piece * kPiece >= columns) break;
      if (lane == 0) stores_read();  // the piece before has left the buffer
      __syncwarp();
      const int r = lane % 16;  // whose address this lane gives, and in which of two units
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float* x = c + 32 * piece + 8 * k;
        const uint32_t unit = (2 * k + lane / 16) ^ (r % 8);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         staging + r * 128 + unit * 16),
                     "r"(Vec<Out>::pack(x)), "r"(Vec<Out>::pack(x + 2)), "r"(Vec<Out>::pack(x + 4)),
                     "r"(Vec<Out>::pack(x + 6))
                     : "memory");
      }
      copies_see_stores();
      __syncwarp();
      if (lane == 0) store_box(map, row, column + piece * kPiece, staging, policy);
    }
  }
};

}  // namespace klq::cuda
