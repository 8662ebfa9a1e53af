// SPDX-License-Identifier: Apache-2.0
// A product's rows on their way out: from fragments through shared memory to the copy engine.
#pragma once
#include "cuda/gemm.cuh"

namespace klq::cuda {

// A matrix of Out that warps fill, or add to, 16 rows at a time.
template <class Out, bool ADD = false>
struct RowsOut {
  CUtensorMap map;
  int columns;
  Keep keep;

  static constexpr int kPiece = 128 / int(sizeof(Out));  // columns in a box of 16 rows

  cudaError_t encode(const Matrix& m, Keep how) {
    columns = int(m.columns), keep = how;
    return map_boxes(&map, m, 16, kPiece);
  }

  // 128 bytes of each row at a time. The 16-byte units of a row lie in the copy engine's order:
  // unit u of row r at u ^ r % 8.
  template <int BUFFERS, int N>
  __device__ __forceinline__ void put(const float (&c)[N], int row, int column, uint32_t staging,
                                      int lane) const {
    const uint64_t policy = cache_policy(keep);
#pragma unroll
    for (int piece = 0; piece < 2 * N / kPiece; ++piece) {
      if (column + piece * kPiece >= columns) break;
      const uint32_t at = staging + piece % BUFFERS * 2048;
      if (lane == 0) {
        if (piece == 0)
          stores_read<0>();  // the pieces before may have ended in any buffer
        else
          stores_read<BUFFERS - 1>();
      }
      __syncwarp();
      if constexpr (sizeof(Out) == 2) {
        const int r = lane % 16;  // whose address this lane gives, and in which of two units
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float* x = c + 32 * piece + 8 * k;
          const uint32_t unit = (2 * k + lane / 16) ^ (r % 8);
          asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                           at + r * 128 + unit * 16),
                       "r"(Vec<Out>::pack(x)), "r"(Vec<Out>::pack(x + 2)),
                       "r"(Vec<Out>::pack(x + 4)), "r"(Vec<Out>::pack(x + 6))
                       : "memory");
        }
      } else {
        const int r = lane / 4, q = lane % 4;
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float* x = c + 16 * piece + 4 * k + 2 * h;
            const uint32_t unit = (2 * k + q / 2) ^ r;
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + (r + 8 * h) * 128 +
                                                                  unit * 16 + q % 2 * 8),
                         "f"(x[0]), "f"(x[1])
                         : "memory");
          }
      }
      copies_see_stores();
      __syncwarp();
      if (lane == 0) store_box<ADD>(map, row, column + piece * kPiece, at, policy);
    }
  }
};

// The epilogue that does nothing else.
template <class Out, bool ADD>
struct StoreTiles {
  RowsOut<Out, ADD> out;
  int rows;

  template <class Tile, int N>
  __device__ __forceinline__ void finish(const float (&c)[N], int row, int column, uint32_t staging,
                                         int lane) const {
    if (row >= rows || column >= out.columns) return;
    out.template put<Tile::kStaging>(c, row, column, staging, lane);
  }
};

// out = A B^T, or out += A B^T, each element once: the same bits every time.
template <class T, class Tile, class Out, bool ADD>
cudaError_t store_product(const Matrix& a, const Matrix& b, const Matrix& out, cudaStream_t stream,
                          const Tuning& tuning = {}, Keep keep = Keep::first_out) {
  if (out.rows == 0 || out.columns == 0) return cudaSuccess;
  StoreTiles<Out, ADD> store{};
  store.rows = int(out.rows);
  if (cudaError_t e = store.out.encode(out, keep)) return e;
  return launch_gemm<T, Tile>(a, b, store, stream, tuning);
}

}  // namespace klq::cuda
