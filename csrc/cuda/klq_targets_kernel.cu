// SPDX-License-Identifier: Apache-2.0
// From the rows of logits to lambda-returns in one launch: whoever completes a sequence scans it.
//
// Every token of a sequence, masked or not, adds one to its sequence's count after what it leaves
// is visible to all; the warp that adds the last one finds everything there and runs the scan.
// Nobody waits, and the scan's order does not depend on who runs it.
#include "cuda/klq_targets.h"
#include "cuda/row_launch.cuh"
#include "cuda/scan.cuh"

namespace klq::cuda {
namespace {

template <bool REF>
struct Targets {
  static constexpr bool kGrad = false, kRef = REF, kMoments = false, kHeavy = true;
  static constexpr bool kSpread = false;
  TargetArgs a;

  struct Inputs {
    float cached;
  };
  __device__ int64_t action(int64_t r) const { return a.actions[r]; }
  __device__ Inputs load(int64_t r) const { return {REF ? 0.0f : a.cached[r]}; }

  // By a whole warp; lanes with `mine` bring token t.
  __device__ void arrive(int64_t t, bool mine) const {
    Cursor at(a.scan.seqs);
    mine = mine && at.seek(t);
    bool last = false;
    if (mine) {
      __threadfence();
      last = atomicAdd(a.arrived + at.index, 1) == int(at.end - at.begin) - 1;
    }
    for (uint32_t done = __ballot_sync(~0u, last); done; done &= done - 1) {
      const int from = __ffs(int(done)) - 1;
      const int64_t sequence = __shfl_sync(~0u, at.index, from);
      const int64_t begin = __shfl_sync(~0u, at.begin, from), end = __shfl_sync(~0u, at.end, from);
      __syncwarp();
      __threadfence();
      const Group<0> warp{32, int(threadIdx.x) % 32};
      scan_sequence<true>(a.scan, warp, sequence, begin, end, chunks_between(begin, end, 32));
    }
  }
  __device__ float finish(const RowInfo<Targets>& info, const Sums<REF, false>& sums,
                          const RowSum& row, const Scale& s, int who) const {
    if (who >= 32) return 0.0f;
    const int64_t r = info.index;
    if (who == 0) {
      const bool known = info.action >= 0;
      const float logprob = known ? float(row.logprob) : not_a_number();
      float ref_logprob = info.inputs.cached;
      if (REF) {
        const RowSum ref(sums.ref_max, sums.ref_sum, info.ref_chosen, s);
        ref_logprob = known ? float(ref.logprob) : not_a_number();
      }
      a.logprobs[r] = logprob, a.ref_logprobs[r] = ref_logprob;
      a.log_ratios[r] = logprob - ref_logprob;
      Cursor at(a.scan.seqs);
      if (!at.seek(r)) a.scan.q[r] = a.scan.advantages[r] = a.scan.returns[r] = not_a_number();
    }
    arrive(r, who == 0);
    return 0.0f;
  }
  __device__ void inactive(int64_t r) const {
    if (r >= 0) {
      a.logprobs[r] = a.ref_logprobs[r] = a.log_ratios[r] = 0.0f;
      Cursor at(a.scan.seqs);
      if (!at.seek(r)) a.scan.q[r] = a.scan.advantages[r] = a.scan.returns[r] = 0.0f;
    }
    arrive(r, r >= 0);
  }
};

}  // namespace

cudaError_t target_rows(const Rows& rows, const Rows* ref, const ActiveRows& active,
                        Scaling scaling, const TargetArgs& args, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  const size_t bytes = size_t(args.scan.seqs.count) * sizeof(int32_t);
  if (bytes)
    if (cudaError_t e = cudaMemsetAsync(args.arrived, 0, bytes, stream)) return e;
  const RowSet set{rows, ref, nullptr, active};
  return ref ? launch(set, scaling, Targets<true>{args}, stream)
             : launch(set, scaling, Targets<false>{args}, stream);
}

}  // namespace klq::cuda
