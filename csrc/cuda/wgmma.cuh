// SPDX-License-Identifier: Apache-2.0
// Hopper's matrix instruction, issued by a warpgroup (4 warps from a multiple of 4), and what goes
// with it. Needs sm_90a, not sm_90; nothing here is compiled unless a kernel uses it.
//
// A fragment of 64 x N floats: element 4 j + 2 h + i of lane l of warp w lies in row 16 w + l / 4 +
// 8 h and column 8 j + 2 (l % 4) + i, so the 4 lanes of a quad hold two whole rows.
#pragma once
#include <type_traits>

#include "cuda/vec.cuh"

namespace klq::cuda {

template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Before the first product that uses registers other instructions have touched.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most PENDING of the committed groups are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler knows a fragment as written when the product is issued: with this after the wait, no
// use of it moves before.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) asm volatile("" : "+f"(d[k])::"memory");
}

// Of 8 x 8 16-bit elements, of which a lane holds a pair of row lane / 4 as in a fragment.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
  return y;
}

// Where an operand lies in shared memory, in the 128-byte swizzle: 128-byte rows, 64 deep, 8 rows
// after 8; or ACROSS, as boxes of 8192 bytes, each 64 of its rows side by side and 64 deep, 8 after
// 8. Adding bytes / 16 moves it.
template <bool ACROSS>
__device__ __forceinline__ uint64_t matrix_at(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kEightRows = uint64_t(1024 >> 4) << 32;
  constexpr uint64_t kLeading = uint64_t(ACROSS ? 8192 >> 4 : 1) << 16;
  return kSwizzle128 | kEightRows | kLeading | ((address & 0x3ffff) >> 4);
}

#define KLQ_D64                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KLQ_D96                                                                        \
  KLQ_D64                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define KLQ_F8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define KLQ_F32(i) KLQ_F8(i), KLQ_F8(i + 8), KLQ_F8(i + 16), KLQ_F8(i + 24)
#define KLQ_F64 KLQ_F32(0), KLQ_F32(32)
#define KLQ_F96 KLQ_F64, KLQ_F32(64)

// d = a b^T, or d + a b^T: 64 x 16 by 192 x 16, bfloat16. Runs on after its issue, until a wait.
template <bool A_ACROSS, bool B_ACROSS>
__device__ __forceinline__ void wgmma(float (&d)[96], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" KLQ_D96
      "}, %96, %97, add, 1, 1, %99, %100;\n}"
      : KLQ_F96
      : "l"(a), "l"(b), "r"(int(add)), "n"(int(A_ACROSS)), "n"(int(B_ACROSS)));
}

#undef KLQ_F96
#undef KLQ_F64
#undef KLQ_F32
#undef KLQ_F8
#undef KLQ_D96
#undef KLQ_D64

}  // namespace klq::cuda
