// SPDX-License-Identifier: Apache-2.0
// The Hopper instructions the row kernels need: mbarriers, bulk copies into shared memory, and
// stores into the shared memory of the other blocks of a cluster. Empty below sm_90.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace klq::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// A value the compiler keeps in a register: it would reckon an address in shared memory anew at
// every use, six instructions each.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ void barrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}
__device__ __forceinline__ void barrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival that also announces `bytes` still to come.
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// How many arrivals a warp makes of what all its lanes have done: one, after __syncwarp. That is no
// instruction where the warp has not diverged, so racecheck cannot see it; built for racecheck,
// every lane arrives for itself.
#ifdef KLQ_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ __forceinline__ void warp_arrive(uint32_t bar, int lane) {
  __syncwarp();
  if (kWarpArrivals == 32 || lane == 0) barrier_arrive(bar);
}
template <bool CLUSTER = false>
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  if constexpr (CLUSTER) {  // what other blocks wrote is visible after it; dearer than the other
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT%=;\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
    return;
  }
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT%=;\n}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
// Both addresses and `bytes` are multiples of 16.
// keep: the lines stay in L2 until they are written back, which makes a pass in place 2 to 6 %
// faster (H200, 2026-11-22).
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t bar, bool keep) {
  if (keep) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(bar), "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(bar)
        : "memory");
  }
}
// In order with bulk copies that are asked for later.
__device__ __forceinline__ void store_before_copies(uint32_t to, uint4 x) {
  asm volatile(
      "st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n"
      "fence.proxy.async.shared::cta;" ::"r"(to),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
      : "memory");
}
// The 16 bytes that begin `shift` bytes after `from`; the next 16 are read only for shift > 0. The
// shift is the same for all threads of a warp.
__device__ __forceinline__ uint4 load_shifted(uint32_t from, int shift) {
  const uint4 x = load_shared(from);
  if (shift == 0) return x;
  const uint4 y = load_shared(from + 16);
  uint32_t w[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
  const bool one = shift & 4, two = shift & 8;
#pragma unroll
  for (int k = 0; k < 7; ++k) w[k] = one ? w[k + 1] : w[k];
#pragma unroll
  for (int k = 0; k < 5; ++k) w[k] = two ? w[k + 2] : w[k];
  const uint32_t bits = (shift & 3) * 8;
  return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                    __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}
// `address` of this block, in block `rank` of the cluster.
__device__ __forceinline__ uint32_t in_block(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
// Two floats into another block's shared memory; its barrier counts the 8 bytes.
__device__ __forceinline__ void send_pair(uint32_t to, float x, float y, uint32_t bar) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
          to),
      "r"(__float_as_uint(x)), "r"(__float_as_uint(y)), "r"(bar)
      : "memory");
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

#endif

}  // namespace klq::cuda
