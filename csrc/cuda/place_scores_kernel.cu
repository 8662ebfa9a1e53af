// SPDX-License-Identifier: Apache-2.0
// Zeros, then a warp a sequence looks for its last active token, from the right.
#include "cuda/scan.cuh"

namespace klq::cuda {
namespace {

constexpr int kWarps = 4, kStep = 16;  // tokens a lane looks at

__global__ void __launch_bounds__(32 * kWarps)
    place_scores_kernel(const Sequences seqs, const Reals scores, const uint8_t* mask,
                        float* rewards) {
  const int lane = threadIdx.x % 32;
  const int64_t sequence = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (sequence >= seqs.count) return;
  const Cursor cursor(seqs);
  const int64_t begin = max(cursor.bound(sequence), int64_t(0));
  const int64_t end = min(cursor.bound(sequence + 1), seqs.tokens);
  for (int64_t stop = end; stop > begin; stop -= 32 * kStep) {
    const int64_t t = stop - (32 - lane) * kStep;
    int64_t last = -1;
#pragma unroll
    for (int k = 0; k < kStep; ++k)
      if (t + k >= begin && mask[t + k]) last = t + k;
    const unsigned found = __ballot_sync(~0u, last >= 0);
    if (found == 0) continue;
    if (lane == 31 - __clz(found)) rewards[last] = load(scores, sequence);
    return;
  }
}

}  // namespace

cudaError_t launch_place_scores(const Sequences& seqs, const Reals& scores, const uint8_t* mask,
                                float* rewards, cudaStream_t stream) {
  if (seqs.tokens == 0) return cudaSuccess;
  const cudaError_t error = cudaMemsetAsync(rewards, 0, seqs.tokens * sizeof(float), stream);
  if (error != cudaSuccess || seqs.count == 0) return error;
  const int64_t blocks = (seqs.count + kWarps - 1) / kWarps;
  place_scores_kernel<<<unsigned(blocks), 32 * kWarps, 0, stream>>>(seqs, scores, mask, rewards);
  return cudaGetLastError();
}

}  // namespace klq::cuda
