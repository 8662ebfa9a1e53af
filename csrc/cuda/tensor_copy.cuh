// SPDX-License-Identifier: Apache-2.0
// Boxes of a matrix between global and shared memory through Hopper's copy engine: what lies
// outside the matrix is read as 0 and never written.
#pragma once
#include <cuda.h>

#include "cuda/hopper.cuh"
#include "cuda/types.h"

namespace klq::cuda {

// A matrix of rows x columns in global memory, whose rows begin `stride` elements apart, and boxes
// of box_rows x box_columns that fill 128-byte rows of shared memory, or 64-byte ones, swizzled.
struct Matrix {
  const void* data;
  Type type;
  int64_t rows, columns, stride;
};

inline cudaError_t map_boxes(CUtensorMap* map, const Matrix& m, int box_rows, int box_columns) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {  // from the driver at run time: nothing links against libcuda
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                           cudaEnableDefault, &result);
#else
    const cudaError_t e =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool ok = e == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const int size = m.type == Type::f32 ? 4 : 2;
  const cuuint64_t sizes[2] = {cuuint64_t(m.columns), cuuint64_t(m.rows)};
  const cuuint64_t strides[1] = {cuuint64_t(m.stride) * size};
  const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapDataType type = m.type == Type::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : m.type == Type::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(m.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_columns * size == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ __forceinline__ uint64_t normal_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The box that begins at (row, column), to address `to` of every block of the cluster that `mask`
// names; the barrier `bar` of each counts its bytes.
template <bool MANY>
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int row, int column,
                                         uint32_t bar, uint16_t mask, uint64_t policy) {
  if constexpr (MANY)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(bar), "h"(mask), "l"(policy)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(bar), "l"(policy)
        : "memory");
}

// What this thread's stores wrote to shared memory is there for copies asked for later.
__device__ __forceinline__ void copies_see_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// One group of copies out.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int row, int column,
                                          uint32_t from, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint"
      " [%0, {%1, %2}], [%3], %4;" ::"l"(&map),
      "r"(column), "r"(row), "r"(from), "l"(policy)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Added to the float32 matrix, in L2.
__device__ __forceinline__ void add_box(const CUtensorMap& map, int row, int column,
                                        uint32_t from) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group"
      " [%0, {%1, %2}], [%3];" ::"l"(&map),
      "r"(column), "r"(row), "r"(from)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all of this thread's groups have read shared memory.
__device__ __forceinline__ void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void stores_done() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace klq::cuda
