// SPDX-License-Identifier: Apache-2.0
// One block: a batch has thousands of tokens, and what counts is one launch in place of ten.
#include "cuda/compact_tokens.h"
#include "cuda/vec.cuh"

namespace klq::cuda {
namespace {

constexpr int kThreads = 1024, kEach = 8;  // tokens of a thread at a time

__global__ void __launch_bounds__(kThreads) compact_kernel(const CompactArgs a) {
  __shared__ int sums[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int64_t total = 0;
  for (int64_t from = 0; from < a.tokens; from += kThreads * kEach) {
    const int64_t first = from + threadIdx.x * kEach;
    uint32_t active = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (first + k < a.tokens && a.mask[first + k]) active |= 1u << k;
    int upto = __popc(active);  // of the warp's threads so far, then of the block's
    for (int o = 1; o < 32; o *= 2) {
      const int below = __shfl_up_sync(~0u, upto, o);
      if (lane >= o) upto += below;
    }
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) upto += sums[w];
      all += sums[w];
    }
    int64_t slot = total + upto - __popc(active);
    for (; active && slot < a.size; active &= active - 1, ++slot) {
      a.index[slot] = a.source[slot] = first + __ffs(active) - 1;
      a.use[slot] = true;
    }
    total += all;
    __syncthreads();
  }
  for (int64_t slot = total + threadIdx.x; slot < a.size; slot += kThreads) {
    a.index[slot] = a.tokens, a.source[slot] = a.tokens - 1;
    a.use[slot] = false;
  }
  if (threadIdx.x == 0) *a.bad = total > a.size ? not_a_number() : 0.0f;
}

}  // namespace

cudaError_t compact_tokens(const CompactArgs& args, cudaStream_t stream) {
  compact_kernel<<<1, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace klq::cuda
