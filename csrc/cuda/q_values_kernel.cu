// SPDX-License-Identifier: Apache-2.0
// Q(s, .) of every row: the sums of both models, then a second read (from L2) for the result.
#include "cuda/q_values.h"
#include "cuda/row_launch.cuh"

namespace klq::cuda {
namespace {

template <class Reader, bool CAPPED, int LANES>
__global__ void __launch_bounds__(RowGroup<LANES>::kThreads, RowGroup<LANES>::blocks())
    q_values_kernel(const Rows rows, const Rows refs, const Scale scale, float tau,
                    const float* values, float* q) {
  constexpr int kWidth = Reader::kWidth;
  RowGroup<LANES> group;
  for (int64_t r = group.first; r < rows.count; r += group.step) {
    const Reader in(rows, &refs, nullptr, r);
    const auto sum = sum_row<true, false, CAPPED>(in, -1, -infinity(), -infinity(), scale, group);
    // without a chosen token, `rest` is the whole sum
    const RowSum row(sum.max, sum.sum, -infinity(), scale);
    const RowSum ref(sum.ref_max, sum.ref_sum, -infinity(), scale);
    const float log_s = logf(row.rest), ref_log_s = logf(ref.rest), value = values[r];
    float* out = q + r * rows.width;
    auto at = [&](float z, float zr) {
      const float x = (capped<CAPPED>(z, scale) - row.max) * scale.inverse - log_s;
      const float y = (capped<CAPPED>(zr, scale) - ref.max) * scale.inverse - ref_log_s;
      return z == -infinity() ? -infinity() : fmaf(tau, x - y, value);
    };
    for (int unit = group.thread; unit < in.units(); unit += LANES) {
      float z[kWidth], zr[kWidth];
      in.load(unit, z);
      in.load_ref(unit, zr);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) z[e] = at(z[e], zr[e]);
      float* to = out + unit * kWidth;
      const int count = int(rows.width) - unit * kWidth;
      if (kWidth >= 4 && count >= kWidth && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
#pragma unroll
        for (int e = 0; e + 4 <= kWidth; e += 4)
          __stcs(reinterpret_cast<float4*>(to + e),
                 make_float4(z[e], z[e + 1], z[e + 2], z[e + 3]));
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
          if (e < count) to[e] = z[e];
      }
    }
  }
}

}  // namespace

cudaError_t q_value_rows(const Rows& rows, const Rows& ref, Scaling scaling, float tau,
                         const float* values, float* q, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  Device device;
  if (cudaError_t e = this_device(&device)) return e;
  const Scale scale(scaling);
  return with_reader(rows, &ref, nullptr, [&](auto reader, auto lanes) {
    using Reader = typename decltype(reader)::type;
    auto kernel = scaling.softcap > 0 ? q_values_kernel<Reader, true, lanes.value>
                                      : q_values_kernel<Reader, false, lanes.value>;
    kernel<<<stream_grid<lanes.value>(rows, device), RowGroup<lanes.value>::kThreads, 0, stream>>>(
        rows, ref, scale, tau, values, q);
    return cudaGetLastError();
  });
}

}  // namespace klq::cuda
