// SPDX-License-Identifier: Apache-2.0
// A mask as a list: active rows from the front, inactive ones from the end. Blocks take their
// places by atomics, so the order of the list varies; no result depends on it.
#include "cuda/rows.h"

namespace klq::cuda {
namespace {

constexpr int kThreads = 256, kEach = 8;

__global__ void __launch_bounds__(kThreads)
    list_rows_kernel(const Activity a, int64_t count, int32_t* counters, int32_t* list) {
  int64_t end = count;
  if (a.last)
    end = a.wide_last ? *static_cast<const int64_t*>(a.last) : *static_cast<const int32_t*>(a.last);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = int64_t(blockIdx.x) * (kThreads * kEach) + warp * (32 * kEach);
  uint32_t votes[kEach];
  int active = 0, there = 0;  // of this warp
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t r = begin + k * 32 + lane;
    votes[k] = __ballot_sync(~0u, r < count && r < end && (!a.mask || a.mask[r]));
    active += __popc(votes[k]);
    there += __popc(__ballot_sync(~0u, r < count));
  }
  int front = 0, back = 0;
  if (lane == 0) {
    if (active) front = atomicAdd(counters, active);
    if (there > active) back = atomicAdd(counters + 1, there - active);
  }
  front = __shfl_sync(~0u, front, 0);
  back = __shfl_sync(~0u, back, 0);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t r = begin + k * 32 + lane;
    const uint32_t before = (1u << lane) - 1, valid = __ballot_sync(~0u, r < count);
    if (r < count) {
      if (votes[k] >> lane & 1)
        list[front + __popc(votes[k] & before)] = int32_t(r);
      else
        list[count - 1 - back - __popc(valid & ~votes[k] & before)] = int32_t(r);
    }
    front += __popc(votes[k]);
    back += __popc(valid & ~votes[k]);
  }
}

}  // namespace

cudaError_t list_rows(const Activity& activity, int64_t count, int32_t* scratch, ActiveRows* out,
                      cudaStream_t stream) {
  if (cudaError_t e = cudaMemsetAsync(scratch, 0, 2 * sizeof(int32_t), stream)) return e;
  *out = {scratch + 2, scratch};
  if (count == 0) return cudaSuccess;
  const int64_t blocks = (count + kThreads * kEach - 1) / (kThreads * kEach);
  list_rows_kernel<<<unsigned(blocks), kThreads, 0, stream>>>(activity, count, scratch,
                                                              scratch + 2);
  return cudaGetLastError();
}

}  // namespace klq::cuda
