// SPDX-License-Identifier: Apache-2.0
// The LM head's rows summed up in the product's epilogue, and e^(logit - reference) in place of
// logits where they are wanted.
#include "cuda/linear_rows.h"
#include "cuda/row_sums.cuh"
#include "cuda/store_tiles.cuh"

namespace klq::cuda {
namespace {

using Tile = Tiling<2, 192, 5, 2>;

// f(element, half, column) for all elements of a fragment: half 0 is row lane / 4, half 1 eight
// further down, and columns count from the thread's first
template <int N, class F>
__device__ __forceinline__ void each(float (&c)[N], F f) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) f(c[4 * j + 2 * h + i], h, 8 * j + i);
}

// `column` is the thread's first
template <class T, int N>
__device__ __forceinline__ void add_bias(float (&c)[N], const T* bias, int column, int columns) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = column + 8 * j + i;
      const float b = at < columns ? Vec<T>::get(bias + at) : 0.0f;
      c[4 * j + i] += b, c[4 * j + 2 + i] += b;
    }
}

// unused where the product is not built
[[maybe_unused]] __device__ __forceinline__ float over_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
[[maybe_unused]] __device__ __forceinline__ float top_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// What a call leaves in its scratch memory.
struct Scratch {
  float2* pairs;     // [tiles, rows]: max, and sum of 2^exponent without the chosen token
  float* plain;      // [tiles, rows]: sum of 2^exponent times the exponent; null: not wanted
  float* chosen;     // [rows]: y of the action; written only where it is one of the columns
  int* again;        // whether some reference was too far off
  float* reference;  // [rows]: y from which the row's exponents are reckoned; inactive: infinity

  static int64_t floats(int64_t rows, int64_t tiles, bool entropy) {
    return rows * ((2 + entropy) * tiles + 1) + 1;
  }
  Scratch() = default;
  Scratch(float* from, float* reference, int64_t rows, int64_t tiles, bool entropy)
      : pairs(reinterpret_cast<float2*>(from)),
        plain(entropy ? from + 2 * rows * tiles : nullptr),
        chosen(from + (2 + entropy) * rows * tiles),
        again(reinterpret_cast<int*>(chosen + rows)),
        reference(reference) {}
};

enum class Wanted { sums, moments, exponentials, dlogits };

template <class T, bool CAPPED, Wanted WANTED>
struct RowTiles {
  static constexpr bool kGiven = WANTED == Wanted::dlogits;  // references; no sums are wanted
  static constexpr bool kStores = WANTED == Wanted::exponentials || kGiven;

  RowsOut<T> out;
  Scratch to;
  const float *times, *own;  // [rows], of dlogits
  const T* bias;
  const int64_t* actions;
  int rows, columns;
  Scale scale;
  bool only_again;

  __device__ __forceinline__ bool wanted() const { return kGiven || !only_again || *to.again; }

  template <int N>
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
    float top[2] = {-infinity(), -infinity()}, sum[2] = {}, plain[2] = {}, point[2];
    if (!kGiven) each(c, [&](float& y, int h, int) { top[h] = fmaxf(top[h], y); });
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
    here = __any_sync(~0u, here);  // rare: one of a row's tiles
    if (!kGiven && here) {
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
        const float t = scale.exponent(y, from[h], point[h]), e = exp2_fast(t);
        sum[h] += e;
        if (WANTED == Wanted::moments) plain[h] = fmaf(e, fmaxf(t, -16384.0f), plain[h]);
        const float x = y * scale.inv_cap;
        y = e == 0.0f ? 0.0f : e * fmaf(-x, x, 1.0f) * scale.inverse;
      });
    } else {
      if (__any_sync(~0u, far)) {  // rare: Scale::exponent takes differences
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (scale.huge(from[h])) point[h] = 0.0f;
        each(c, [&](float& y, int h, int) { y = scale.huge(from[h]) ? y - from[h] : y; });
      }
      each(c, [&](float& y, int h, int) {
        const float t = fmaf(y, scale.factor, -point[h]);
        y = exp2_fast(t);
        sum[h] += y;
        if (WANTED == Wanted::moments) plain[h] = fmaf(y, fmaxf(t, -16384.0f), plain[h]);
      });
    }
    if constexpr (kGiven) {
      float by[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) by[h] = first + 8 * h < rows ? times[first + 8 * h] : 0.0f;
      each(c, [&](float& y, int h, int) { y *= by[h]; });
      if (here) {
        float mine[2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (action[h] >= 0) mine[h] = by[h] * own[first + 8 * h];
        each(c, [&](float& y, int h, int at) { y = at == action[h] ? mine[h] : y; });
      }
    } else {  // sums before the copies out, which take registers of their own
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] = over_quad(sum[h]), top[h] = top_of_quad(top[h]);
        if (WANTED == Wanted::moments) plain[h] = over_quad(plain[h]);
      }
      const int r = first + 8 * quad;  // two of the four lanes write a row each
      if (quad < 2 && r < rows) {
        const int64_t at = int64_t(column / kColumns) * rows + r;
        to.pairs[at] = quad ? make_float2(top[1], sum[1]) : make_float2(top[0], sum[0]);
        if (WANTED == Wanted::moments) to.plain[at] = quad ? plain[1] : plain[0];
      }
    }
    if constexpr (kStores) out.put(c, row, column, staging, lane);
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
  if (lane != 0) return;
  // exponents of inactive rows are -infinity
  a.scratch.reference[row] = !a.active(row) ? infinity() : fabsf(y) < infinity() ? y : 0.0f;
}

constexpr int kMergers = 16;  // warps, each for a part of the tiles of 32 rows

struct Merged {
  float top = -infinity(), sum = 0.0f, plain = 0.0f;
};

// A row over its tiles, in a fixed order; of the first warp's threads, a row each.
__device__ inline Merged merged(const RowArgs& a, int row) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Merged m;
#pragma unroll 8
  for (int t = warp; row < a.rows && t < a.tiles; t += kMergers) {
    const int64_t at = int64_t(t) * a.rows + row;
    const float2 pair = a.scratch.pairs[at];
    m.top = fmaxf(m.top, pair.x), m.sum += pair.y;
    if (a.scratch.plain) m.plain += a.scratch.plain[at];
  }
  __shared__ Merged part[kMergers][32];
  part[warp][lane] = m;
  __syncthreads();
  for (int w = 1; warp == 0 && w < kMergers; ++w) {
    const Merged& x = part[w][lane];
    m.top = fmaxf(m.top, x.top), m.sum += x.sum, m.plain += x.plain;
  }
  return m;
}

// Whether all references were good; where one was not, the row's maximum takes its place.
__global__ void __launch_bounds__(32 * kMergers) check_references_kernel(const RowArgs a) {
  const int row = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
  const Merged m = merged(a, row);
  if (threadIdx.x >= 32 || row >= a.rows || !a.active(row)) return;
  const float top = a.known(row) ? fmaxf(m.top, a.scratch.chosen[row]) : m.top;
  const float off = (top - a.scratch.reference[row]) * a.scale.factor;
  if (fabsf(top) < infinity() && fabsf(off) > 60.0f) {
    a.scratch.reference[row] = top;
    *a.scratch.again = 1;
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kMergers)
    finish_rows_kernel(const RowArgs a, T* out, int64_t stride, float* logprobs, float* entropy,
                       float* factors, float* own) {
  const int row = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
  const Merged m = merged(a, row);
  if (threadIdx.x >= 32 || row >= a.rows) return;
  if (!a.active(row)) {
    logprobs[row] = factors[row] = own[row] = 0.0f;
    if (entropy) entropy[row] = 0.0f;
    return;
  }
  const bool known = a.known(row), cap = a.scale.softcap > 0.0f;
  const float chosen = known ? a.scratch.chosen[row] : -infinity();
  const RowSum sum(a.scratch.reference[row], m.sum, chosen, a.scale);
  const bool finite = fabsf(fmaxf(m.top, chosen)) < infinity();
  logprobs[row] = known && finite ? float(sum.logprob) : not_a_number();
  factors[row] = known ? -(cap ? 1.0f : a.scale.inverse) / sum.raw_sum : not_a_number();
  if (entropy) {
    Sums<false, true> sums;
    sums.plain = m.plain;
    moments(sums, sum, sum, a.scale, entropy + row, nullptr);
    if (!finite) entropy[row] = not_a_number();
  }
  double x = -double(sum.raw_sum) * sum.other;
  if (cap) {
    const double t = double(chosen) / double(a.scale.softcap);
    x *= (1.0 - t * t) / a.scale.temperature;
  }
  own[row] = chosen == -infinity() ? 0.0f : float(x);  // also of an unknown action
  if (known && out) Vec<T>::put(out + row * stride + a.actions[row], own[row]);
}

template <class T, class Tiles>
cudaError_t prepare(const Head& head, Tiles* tiles, Matrix* a, Matrix* b) {
  tiles->bias = static_cast<const T*>(head.bias), tiles->actions = head.actions;
  tiles->rows = int(head.rows), tiles->columns = int(head.columns);
  tiles->scale = Scale(head.scaling);
  *a = {head.hidden, Vec<T>::kType, head.rows, head.depth, head.hidden_stride};
  *b = {head.weight, Vec<T>::kType, head.columns, head.depth, head.weight_stride};
  if (!Tiles::kStores) return cudaSuccess;
  return tiles->out.encode({head.out, Vec<T>::kType, head.rows, head.columns, head.stride});
}

template <class T, bool CAPPED, Wanted WANTED>
cudaError_t run(const LinearRows& args, cudaStream_t stream) {
  constexpr bool kMoments = WANTED == Wanted::moments;
  const Head& head = args.head;
  const int64_t tiles = (head.columns + Tile::kCols - 1) / Tile::kCols;
  float *factors = args.row_stats, *own = factors + head.rows;
  const Scratch scratch(args.scratch, own + head.rows, head.rows, tiles, kMoments);
  const RowArgs rows{scratch,           head.actions, args.mask,          int(head.rows),
                     int(head.columns), int(tiles),   Scale(head.scaling)};
  RowTiles<T, CAPPED, WANTED> store{};
  Matrix a, b;
  if (cudaError_t e = prepare<T>(head, &store, &a, &b)) return e;
  store.to = scratch;
  const unsigned blocks = unsigned((head.rows + 31) / 32);
  reference_kernel<T><<<unsigned((head.rows + 7) / 8), 256, 0, stream>>>(
      rows, static_cast<const T*>(head.hidden), head.hidden_stride,
      static_cast<const T*>(head.weight), head.weight_stride, store.bias, int(head.depth));
  if (cudaError_t e = cudaGetLastError()) return e;
  if (cudaError_t e = launch_gemm<Tile>(a, b, store, stream)) return e;
  check_references_kernel<<<blocks, 32 * kMergers, 0, stream>>>(rows);
  if (cudaError_t e = cudaGetLastError()) return e;
  store.only_again = true;
  if (cudaError_t e = launch_gemm<Tile>(a, b, store, stream)) return e;
  finish_rows_kernel<T><<<blocks, 32 * kMergers, 0, stream>>>(
      rows, static_cast<T*>(head.out), head.stride, args.logprobs, args.entropy, factors, own);
  return cudaGetLastError();
}

template <class T, bool CAPPED>
cudaError_t run(const LinearDlogits& args, cudaStream_t stream) {
  RowTiles<T, CAPPED, Wanted::dlogits> store{};
  Matrix a, b;
  if (cudaError_t e = prepare<T>(args.head, &store, &a, &b)) return e;
  store.to.reference = const_cast<float*>(args.reference);
  store.times = args.scale, store.own = args.own;
  return launch_gemm<Tile>(a, b, store, stream);
}

template <Wanted WANTED>
cudaError_t run(const LinearRows& args, cudaStream_t stream) {
  return args.head.scaling.softcap > 0 ? run<bf16, true, WANTED>(args, stream)
                                       : run<bf16, false, WANTED>(args, stream);
}

bool too_large(const Head& head) {
  constexpr int64_t kLimit = (int64_t(1) << 31) - 4096;
  return head.rows >= kLimit || head.columns >= kLimit || head.depth >= kLimit;
}

}  // namespace

int64_t linear_rows_scratch(int64_t rows, int64_t columns, bool entropy) {
  return Scratch::floats(rows, (columns + Tile::kCols - 1) / Tile::kCols, entropy);
}

cudaError_t linear_rows(const LinearRows& args, cudaStream_t stream) {
  if (args.head.rows == 0) return cudaSuccess;
  if (too_large(args.head)) return cudaErrorInvalidValue;
  if (args.head.out) return run<Wanted::exponentials>(args, stream);
  return args.entropy ? run<Wanted::moments>(args, stream) : run<Wanted::sums>(args, stream);
}

cudaError_t linear_dlogits(const LinearDlogits& args, cudaStream_t stream) {
  if (args.head.rows == 0) return cudaSuccess;
  if (too_large(args.head)) return cudaErrorInvalidValue;
  return args.head.scaling.softcap > 0 ? run<bf16, true>(args, stream)
                                       : run<bf16, false>(args, stream);
}

}  // namespace klq::cuda
