// SPDX-License-Identifier: Apache-2.0
#include "cuda/klq_loss.h"
#include "cuda/row_launch.cuh"

namespace klq::cuda {
namespace {

template <bool GRAD>
struct KLQLoss {
  static constexpr bool kGrad = GRAD, kRef = false, kMoments = false, kHeavy = false;
  static constexpr bool kSpread = false;
  KLQLossArgs a;
  const int32_t* active;
  int64_t count;
  float largest_slope;  // max(1, 1 / temperature)

  struct Inputs {
    float value, ref_logprob, target, weight, normalizer;
  };
  __device__ int64_t action(int64_t r) const { return a.actions[r]; }
  __device__ Inputs load(int64_t r) const {
    const float tokens = float(active ? max(1, *active) : int(count));
    return {a.values[r], a.ref_logprobs[r], a.returns[r], a.weights ? a.weights[r] : 1.0f,
            a.normalizer ? *a.normalizer : tokens};
  }
  __device__ float finish(const RowInfo<KLQLoss>& info, const Sums<false, false>&,
                          const RowSum& row, const Scale&, int who) const {
    const Inputs& in = info.inputs;
    // rounded, so that it differs from a cached log-prob of the same model by exactly 0
    const float logprob = info.action >= 0 ? float(row.logprob) : not_a_number();
    const double residual = a.tau * (double(logprob) - in.ref_logprob) + in.value - in.target;
    const double dq = 2.0 * in.weight * residual / in.normalizer;
    float coefficient = float(a.tau * dq), undo = 1.0f;
    if (a.unscale) {
      // float16: the coefficient is brought to 2^14 by a power of two that the backward undoes, so
      // that nothing flushes to zero before the loss scale is known
      const float largest = fabsf(coefficient) * largest_slope;
      if (largest > 0.0f && largest < infinity()) {
        const int shift = min(max(14 - ilogbf(largest), -100), 100);
        coefficient = ldexpf(coefficient, shift);
        undo = ldexpf(1.0f, -shift);
      }
    }
    if (who == 0) {
      const int64_t r = info.index;
      a.logprobs[r] = logprob, a.residuals[r] = float(residual);
      if (a.dvalues) a.dvalues[r] = float(dq);
      if (a.unscale) a.unscale[r] = undo;
    }
    return coefficient;
  }
  __device__ void inactive(int64_t r) const {
    if (r < 0) return;
    a.logprobs[r] = a.residuals[r] = 0.0f;
    if (a.dvalues) a.dvalues[r] = 0.0f;
    if (a.unscale) a.unscale[r] = 1.0f;
  }
};

constexpr int kSumThreads = 512, kSumWarps = kSumThreads / 32;

// loss and stats from the rows' residuals, in a fixed order and in double: the same bits every run;
// TOKENS: from their log-probs, leaving the gradients behind
template <bool TOKENS>
__global__ void __launch_bounds__(kSumThreads)
    klq_loss_sum_kernel(const KLQLossArgs a, const bool* mask, const int32_t* active,
                        int64_t count) {
  double sums[4] = {};  // loss, squares, log-probs, values
#pragma unroll 8        // loads that do not wait for one another
  for (int64_t r = threadIdx.x; r < count; r += kSumThreads) {
    const bool use = !mask || mask[r];
    const double weight = a.weights ? double(a.weights[r]) : 1.0, logprob = a.logprobs[r];
    double residual;
    if constexpr (TOKENS) {
      residual = a.tau * (logprob - a.ref_logprobs[r]) + a.values[r] - a.returns[r];
      residual = use ? double(float(residual)) : 0.0;
      const double dq = use ? 2.0 * weight * residual / *a.normalizer : 0.0;
      a.dvalues[r] = float(dq), a.residuals[r] = float(a.tau * dq);
    } else {
      residual = a.residuals[r];
    }
    const double square = residual * residual;
    sums[0] += use ? weight * square : 0.0, sums[1] += square;
    sums[2] += use ? logprob : 0.0, sums[3] += use ? double(a.values[r]) : 0.0;
  }
  __shared__ double partial[4][kSumWarps];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    for (int o = 16; o; o /= 2) sums[k] += __shfl_xor_sync(~0u, sums[k], o);
    if (threadIdx.x % 32 == 0) partial[k][threadIdx.x / 32] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int64_t n = active ? *active : count;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    double x = threadIdx.x < kSumWarps ? partial[k][threadIdx.x] : 0.0;
    for (int o = 16; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
    if (threadIdx.x != 0) continue;
    if (k == 0)
      *a.loss = float(x / (a.normalizer ? double(*a.normalizer) : double(n > 1 ? n : 1)));
    else
      a.stats[k - 1] = float(x);
  }
  if (threadIdx.x == 0) a.stats[3] = float(n);
}

// x *= factor; rows whose factor is 1 are left alone, and 0 stays 0 under a factor that is not
// finite
template <class T>
__global__ void __launch_bounds__(256)
    scale_rows_kernel(const Rows rows, const float* unscale, const float* upstream) {
  using V = Vec<T>;
  auto times = [](float x, float f) { return x == 0.0f ? 0.0f : x * f; };
  for (int64_t r = blockIdx.x; r < rows.count; r += gridDim.x) {
    const float f = *upstream * (unscale ? unscale[r] : 1.0f);
    if (f == 1.0f) {
      if (!unscale) return;
      continue;
    }
    T* row = row_of<T>(rows, r);
    const Cut<T> cut(row, int(rows.width));
    uint4* body = reinterpret_cast<uint4*>(row + cut.head);
    for (int v = threadIdx.x; v < cut.body; v += 256) {
      const uint4 x = body[v];
      uint32_t w[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float z[V::kPer];
        V::unpack(w[j], z);
#pragma unroll
        for (int e = 0; e < V::kPer; ++e) z[e] = times(z[e], f);
        w[j] = V::pack(z);
      }
      body[v] = make_uint4(w[0], w[1], w[2], w[3]);
    }
    const int edge = cut.edge(threadIdx.x);
    if (edge >= 0) V::put(row + edge, times(V::get(row + edge), f));
  }
}

}  // namespace

cudaError_t klq_loss_rows(const Rows& rows, const Rows* gradient, const bool* mask,
                          const ActiveRows& active, Scaling scaling, const KLQLossArgs& args,
                          cudaStream_t stream) {
  const float largest_slope = float(std::max(1.0, 1.0 / scaling.temperature));
  const RowSet set{rows, nullptr, gradient, active};
  cudaError_t e =
      gradient ? launch(set, scaling, KLQLoss<true>{args, active.active, rows.count, largest_slope},
                        stream)
               : launch(set, scaling,
                        KLQLoss<false>{args, active.active, rows.count, largest_slope}, stream);
  if (e) return e;
  klq_loss_sum_kernel<false><<<1, kSumThreads, 0, stream>>>(args, mask, active.active, rows.count);
  return cudaGetLastError();
}

cudaError_t loss_of_tokens(const bool* mask, const ActiveRows& active, int64_t count,
                           const KLQLossArgs& args, cudaStream_t stream) {
  klq_loss_sum_kernel<true><<<1, kSumThreads, 0, stream>>>(args, mask, active.active, count);
  return cudaGetLastError();
}

cudaError_t scale_rows(const Rows& rows, const float* unscale, const float* upstream,
                       cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  const unsigned grid = unsigned(std::min<int64_t>(rows.count, 1024));
  switch (rows.type) {
    case Type::f32:
      scale_rows_kernel<float><<<grid, 256, 0, stream>>>(rows, unscale, upstream);
      break;
    case Type::bf16:
      scale_rows_kernel<bf16><<<grid, 256, 0, stream>>>(rows, unscale, upstream);
      break;
    default:
      scale_rows_kernel<f16><<<grid, 256, 0, stream>>>(rows, unscale, upstream);
  }
  return cudaGetLastError();
}

}  // namespace klq::cuda
