// SPDX-License-Identifier: Apache-2.0
// The LM head with e^(logit - reference) in place of its logits: products, references, row sums.
#include "cuda/linear_exponentials.h"
#include "cuda/linear_stats.cuh"

namespace klq::cuda {
namespace {

using Tile = Tiling<2, 192, true, 5, 2, 1>;

// What a call leaves in its scratch memory.
struct Scratch {
  float2* pairs;     // [tiles, rows]: max, and sum of 2^exponent without the chosen token
  float* chosen;     // [rows]: y of the action; written only where it is one of the columns
  float* reference;  // [rows]: y from which the row's exponents are reckoned
  int* again;        // whether some reference was too far off

  Scratch(float* from, int64_t rows, int64_t tiles)
      : pairs(reinterpret_cast<float2*>(from)),
        chosen(from + 2 * rows * tiles),
        reference(chosen + rows),
        again(reinterpret_cast<int*>(reference + rows)) {}
};

template <class T, bool CAPPED>
struct ExponentialTiles {
  RowsOut<T> out;
  Scratch to;
  const T* bias;
  const int64_t* actions;
  int rows, columns;
  Scale scale;
  bool only_again;

  __device__ __forceinline__ bool wanted() const { return !only_again || *to.again; }

  template <class Tile, int N>
  __device__ __forceinline__ void finish(float (&c)[N], int row, int column, uint32_t staging,
                                         int lane) const {
    if (row >= rows || column >= columns) return;
    constexpr int kColumns = 2 * N;
    const int quad = lane % 4, first = row + lane / 4;
    int64_t known[2];  // asked for now, needed later
    float from[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool in = first + 8 * h < rows;
      known[h] = in ? actions[first + 8 * h] : -1;
      from[h] = in ? to.reference[first + 8 * h] : 0.0f;
    }
    if (bias) add_bias(c, bias, column + 2 * quad, columns);
    if (CAPPED) each(c, [&](float& y, int, int) { y = capped<true>(y, scale); });
    if (column + kColumns > columns) {
      const int end = columns - column - 2 * quad;
      each(c, [&](float& y, int, int at) { y = at < end ? y : -infinity(); });
    }
    float top[2] = {-infinity(), -infinity()}, sum[2] = {}, point[2];
    each(c, [&](float& y, int h, int) { top[h] = fmaxf(top[h], y); });
    settle(c);  // nothing that replaces a logit begins before all have been looked at: registers
    int action[2];  // counts from the thread's first column, as in `each`
    bool here = false, far = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t a = known[h] - column;
      const bool mine = a >= 0 && a < kColumns && known[h] < columns && a % 8 / 2 == quad;
      action[h] = mine ? int(a) - 2 * quad : -1;
      here |= mine;
      point[h] = scale.point(from[h]);
      far |= scale.huge(from[h]);
    }
    if (__any_sync(~0u, here)) {  // rare: one of a row's tiles
      float chosen[2] = {};
      each(c, [&](float& y, int h, int at) {
        chosen[h] = at == action[h] ? y : chosen[h];
        y = at == action[h] ? -infinity() : y;
      });
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (action[h] >= 0) to.chosen[first + 8 * h] = chosen[h];
    }
    if constexpr (CAPPED) {
      each(c, [&](float& y, int h, int) {
        const float e = exp2_fast(scale.exponent(y, from[h], point[h])), t = y * scale.inv_cap;
        sum[h] += e;
        y = e == 0.0f ? 0.0f : e * fmaf(-t, t, 1.0f) * scale.inverse;
      });
    } else {
      if (__any_sync(~0u, far)) {  // rare: Scale::exponent takes differences
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (scale.huge(from[h])) point[h] = 0.0f;
        each(c, [&](float& y, int h, int) { y = scale.huge(from[h]) ? y - from[h] : y; });
      }
      each(c, [&](float& y, int h, int) {
        y = exp2_fast(fmaf(y, scale.factor, -point[h]));
        sum[h] += y;
      });
    }
    // sums before the copies out, which take registers of their own
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = over_quad(sum[h]), top[h] = top_of_quad(top[h]);
    const int r = first + 8 * quad;  // two of the four lanes write a row each
    if (quad < 2 && r < rows)
      to.pairs[int64_t(column / kColumns) * rows + r] =
          quad ? make_float2(top[1], sum[1]) : make_float2(top[0], sum[0]);
    out.template put<Tile::kStaging>(c, row, column, staging, lane);
  }
};

struct RowArgs {
  Scratch scratch;
  const int64_t* actions;
  const bool* mask;
  int rows, columns, tiles;
  Scale scale;

  __device__ bool active(int row) const { return !mask || mask[row]; }
  __device__ bool known(int row) const { return actions[row] >= 0 && actions[row] < columns; }
};

// y of every row's action, by a warp a row: a sampled token's logit is near enough to the others
// that count. 0 where there is none.
template <class T>
__global__ void __launch_bounds__(256)
    reference_kernel(const RowArgs a, const T* hidden, int64_t hidden_stride, const T* weight,
                     int64_t weight_stride, const T* bias, int depth) {
  using V = Vec<T>;
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.scratch.again = 0;
  const int row = int(blockIdx.x) * 8 + int(threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (row >= a.rows) return;
  const bool known = a.active(row) && a.known(row);
  float y = 0.0f;
  if (known) {
    const int64_t action = a.actions[row];
    auto h = reinterpret_cast<const uint4*>(hidden + row * hidden_stride);
    auto w = reinterpret_cast<const uint4*>(weight + action * weight_stride);
    for (int i = lane; i < depth / V::kWidth; i += 32) {
      const uint4 p = h[i], q = w[i];
      const uint32_t left[4] = {p.x, p.y, p.z, p.w}, right[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float u[2], v[2];
        V::unpack(left[j], u), V::unpack(right[j], v);
        y = fmaf(u[0], v[0], fmaf(u[1], v[1], y));
      }
    }
    for (int o = 16; o; o /= 2) y += __shfl_xor_sync(~0u, y, o);
    if (bias) y += V::get(bias + action);
    y = a.scale.softcap > 0.0f ? capped<true>(y, a.scale) : y;
  }
  if (lane == 0) a.scratch.reference[row] = fabsf(y) < infinity() ? y : 0.0f;
}

constexpr int kMergers = 8;  // warps, each for a part of the tiles of 32 rows

// A row's max and sum over its tiles, in a fixed order; of the first warp's threads, a row each.
__device__ inline float2 merged(const RowArgs& a, int row) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float top = -infinity(), sum = 0.0f;
#pragma unroll 8
  for (int t = warp; row < a.rows && t < a.tiles; t += kMergers) {
    const float2 pair = a.scratch.pairs[int64_t(t) * a.rows + row];
    top = fmaxf(top, pair.x), sum += pair.y;
  }
  __shared__ float2 part[kMergers][32];
  part[warp][lane] = make_float2(top, sum);
  __syncthreads();
  if (warp == 0)
    for (int w = 1; w < kMergers; ++w) top = fmaxf(top, part[w][lane].x), sum += part[w][lane].y;
  return make_float2(top, sum);
}

// Whether all references were good; where one was not, the row's maximum takes its place.
__global__ void __launch_bounds__(32 * kMergers) check_references_kernel(const RowArgs a) {
  const int row = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
  const float2 m = merged(a, row);
  if (threadIdx.x >= 32 || row >= a.rows || !a.active(row)) return;
  const float top = a.known(row) ? fmaxf(m.x, a.scratch.chosen[row]) : m.x;
  const float off = (top - a.scratch.reference[row]) * a.scale.factor;
  if (fabsf(top) < infinity() && fabsf(off) > 60.0f) {
    a.scratch.reference[row] = top;
    *a.scratch.again = 1;
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kMergers)
    finish_rows_kernel(const RowArgs a, T* out, int64_t stride, float* logprobs, float* factors) {
  const int row = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
  const float2 m = merged(a, row);
  if (threadIdx.x >= 32 || row >= a.rows) return;
  if (!a.active(row)) {
    logprobs[row] = factors[row] = 0.0f;
    return;
  }
  const bool known = a.known(row), cap = a.scale.softcap > 0.0f;
  const float chosen = known ? a.scratch.chosen[row] : -infinity();
  const RowSum sum(a.scratch.reference[row], m.y, chosen, a.scale);
  const bool finite = known && fabsf(fmaxf(m.x, chosen)) < infinity();
  logprobs[row] = finite ? float(sum.logprob) : not_a_number();
  factors[row] = -(cap ? 1.0f : a.scale.inverse) / sum.raw_sum;
  if (!known) return;
  double own = -double(sum.raw_sum) * sum.other;
  if (cap) {
    const double t = double(chosen) / double(a.scale.softcap);
    own *= (1.0 - t * t) / a.scale.temperature;
  }
  Vec<T>::put(out + row * stride + a.actions[row], chosen == -infinity() ? 0.0f : float(own));
}

template <class T, bool CAPPED>
cudaError_t run(const LinearArgs& args, const int64_t* actions, float* logprobs, float* factors,
                cudaStream_t stream) {
  const int64_t tiles = (args.columns + Tile::kCols - 1) / Tile::kCols;
  const Scratch scratch(args.scratch, args.rows, tiles);
  const RowArgs rows{scratch,           actions,    args.mask,          int(args.rows),
                     int(args.columns), int(tiles), Scale(args.scaling)};
  auto hidden = static_cast<const T*>(args.hidden), weight = static_cast<const T*>(args.weight);
  auto bias = static_cast<const T*>(args.bias);
  ExponentialTiles<T, CAPPED> store{{},        scratch,      bias,       actions,
                                    rows.rows, rows.columns, rows.scale, false};
  const Matrix out{args.logits, args.type, args.rows, args.columns, args.logits_stride};
  if (cudaError_t e = store.out.encode(out, Keep::normal)) return e;
  const Matrix a{args.hidden, args.type, args.rows, args.depth, args.hidden_stride};
  const Matrix b{args.weight, args.type, args.columns, args.depth, args.weight_stride};
  const unsigned blocks = unsigned((args.rows + 31) / 32);
  reference_kernel<T><<<unsigned((args.rows + 7) / 8), 256, 0, stream>>>(
      rows, hidden, args.hidden_stride, weight, args.weight_stride, bias, int(args.depth));
  if (cudaError_t e = cudaGetLastError()) return e;
  if (cudaError_t e = launch_gemm<T, Tile>(a, b, store, stream)) return e;
  check_references_kernel<<<blocks, 32 * kMergers, 0, stream>>>(rows);
  if (cudaError_t e = cudaGetLastError()) return e;
  store.only_again = true;
  if (cudaError_t e = launch_gemm<T, Tile>(a, b, store, stream)) return e;
  finish_rows_kernel<T><<<blocks, 32 * kMergers, 0, stream>>>(
      rows, static_cast<T*>(args.logits), args.logits_stride, logprobs, factors);
  return cudaGetLastError();
}

}  // namespace

int64_t linear_exponentials_scratch(int64_t rows, int64_t columns) {
  const int64_t tiles = (columns + Tile::kCols - 1) / Tile::kCols;
  return rows * (2 * tiles + 2) + 1;
}

cudaError_t linear_exponentials(const LinearArgs& args, const int64_t* actions, float* logprobs,
                                float* factors, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  constexpr int64_t kLimit = (int64_t(1) << 31) - 4096;
  if (args.rows >= kLimit || args.columns >= kLimit || args.depth >= kLimit)
    return cudaErrorInvalidValue;
  if (args.type != Type::bf16) return cudaErrorNotSupported;  // float16 would overflow
  return args.scaling.softcap > 0 ? run<bf16, true>(args, actions, logprobs, factors, stream)
                                  : run<bf16, false>(args, actions, logprobs, factors, stream);
}

}  // namespace klq::cuda
