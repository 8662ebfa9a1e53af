// SPDX-License-Identifier: Apache-2.0
// The Boltzmann value of every row: log S_b of the reference first, then the sum over
// log pi_b + q / tau, whose second read of the reference comes from L2.
#include "cuda/q_values.h"
#include "cuda/row_launch.cuh"

namespace klq::cuda {
namespace {

// Rows of log pi_b + q / tau; terms with q = -inf or pi_b = 0 are -inf.
template <class Reader, bool CAPPED>
struct Exponents {
  static constexpr int kWidth = Reader::kWidth, kUnroll = Reader::kUnroll;
  const Reader& in;  // q, with the reference beside it
  const Scale& scale;
  float ref_max, ref_log_sum, inverse_tau;

  __device__ int units() const { return in.units(); }
  __device__ float join(float q, float z) const {
    const float x = (capped<CAPPED>(z, scale) - ref_max) * scale.inverse - ref_log_sum;
    // in a reference that is no distribution no pi_b is 0: its sum is NaN, and so is x
    const bool no_chance = z == -infinity() && !isnan(ref_log_sum);
    return no_chance || q == -infinity() ? -infinity() : fmaf(q, inverse_tau, x);
  }
  __device__ void load(int unit, float* y) const {
    float z[kWidth];
    in.load(unit, y);
    in.load_ref(unit, z);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) y[e] = join(y[e], z[e]);
  }
};

// The reference alone.
template <class Reader>
struct Reference {
  static constexpr int kWidth = Reader::kWidth, kUnroll = Reader::kUnroll;
  const Reader& in;

  __device__ int units() const { return in.units(); }
  __device__ void load(int unit, float* z) const { in.load_ref(unit, z); }
};

template <class Reader, bool CAPPED, int LANES>
__global__ void __launch_bounds__(RowGroup<LANES>::kThreads, RowGroup<LANES>::blocks())
    boltzmann_values_kernel(const Rows rows, const Rows refs, const Scale scale, const Scale one,
                            float tau, float* values) {
  RowGroup<LANES> group;
  for (int64_t r = group.first; r < rows.count; r += group.step) {
    const Reader in(rows, &refs, nullptr, r);
    const auto b = sum_row<false, false, CAPPED>(Reference<Reader>{in}, -1, -infinity(),
                                                 -infinity(), scale, group);
    const RowSum ref(b.max, b.sum, -infinity(), scale);
    const Exponents<Reader, CAPPED> exponents{in, scale, ref.max, logf(ref.rest), 1.0f / tau};
    const auto sum =
        sum_row<false, false, false>(exponents, -1, -infinity(), -infinity(), one, group);
    const RowSum total(sum.max, sum.sum, -infinity(), one);
    // an infinite maximum is the answer; a row of NaN has none
    float value = tau * (sum.max + logf(total.rest));
    if (sum.max == infinity() || (sum.max == -infinity() && sum.sum == 0.0f)) value = sum.max;
    if (group.thread == 0) values[r] = value;
  }
}

}  // namespace

cudaError_t boltzmann_rows(const Rows& q, const Rows& ref, Scaling scaling, float tau,
                           float* values, cudaStream_t stream) {
  if (q.count == 0) return cudaSuccess;
  Device device;
  if (cudaError_t e = this_device(&device)) return e;
  const Scale scale(scaling), one(Scaling{1, 0});
  return with_reader(q, &ref, nullptr, [&](auto reader, auto lanes) {
    using Reader = typename decltype(reader)::type;
    auto kernel = scaling.softcap > 0 ? boltzmann_values_kernel<Reader, true, lanes.value>
                                      : boltzmann_values_kernel<Reader, false, lanes.value>;
    kernel<<<stream_grid<lanes.value>(q, device), RowGroup<lanes.value>::kThreads, 0, stream>>>(
        q, ref, scale, one, tau, values);
    return cudaGetLastError();
  });
}

}  // namespace klq::cuda
