// SPDX-License-Identifier: Apache-2.0
// The regimes of the reverse scan, chosen from shapes only.
//
// Rows enough to fill the device, or short: a group of lanes, warps or one block a row, one launch.
// Few long rows, and everything packed: flat spans of tokens, a block a span, in two launches. The
// first writes each span's map (only of its part that the span to its left needs), the second
// composes the maps right of a span in fixed order and scans the span. Nobody waits for anybody,
// nothing needs to be zero before, and short sequences cost the first launch almost no reading.
#include <algorithm>

#include "cuda/scan.cuh"

namespace klq::cuda {
namespace {

constexpr int kThreads = 32 * kMaxWarps;
constexpr int64_t kChunk = kThreads * kLaneTokens;
constexpr int kLanesBlock = 128;

// `lanes` <= 32 a row
template <bool kPlain>
__global__ void __launch_bounds__(kLanesBlock, kPlain ? 6 : 4)
    row_lanes_kernel(const ScanArgs s, int lanes) {
  const int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
  const Group<false> group{lanes, int(threadIdx.x) % lanes, nullptr};
  const int64_t length = s.seqs.length, begin = row * length;
  scan_sequence<kPlain>(s, group, row, begin, begin + length, chunks_of(length, lanes));
}

// a block a row
template <bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? 4 : 2) row_block_kernel(const ScanArgs s) {
  __shared__ ScanMap maps[2][kMaxWarps];
  const Group<true> group{int(blockDim.x), int(threadIdx.x), maps};
  const int64_t length = s.seqs.length, begin = blockIdx.x * length;
  scan_sequence<kPlain>(s, group, blockIdx.x, begin, begin + length, chunks_of(length, blockDim.x));
}

// maps[j]: span j up to the end of the sequence it begins in, if that began before the span. Its
// bootstrap is folded in where it ends here.
template <bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? 4 : 2)
    span_maps_kernel(const ScanArgs s, int64_t span, ScanMap* maps) {
  __shared__ ScanMap shared[2][kMaxWarps];
  const Group<true> group{kThreads, int(threadIdx.x), shared};
#if defined(KLQ_TUNE) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  const int64_t j = blockIdx.x + 1, begin = j * span;
  Cursor cursor(s.seqs);
  if (!cursor.seek(begin) || cursor.begin == begin) return;
  const int64_t edge = min(begin + span, s.seqs.tokens), end = min(edge, cursor.end);
  ScanMap map = scan_range<kPlain, false, false>(
      s, group, begin, end, chunks_of(end - begin, kThreads),
      [&] { return Start{s.lam_rows.data ? double(load(s.lam_rows, cursor.index)) : s.lam, 0.0}; });
  if (cursor.end <= edge) {
    const double boot = s.bootstrap.data ? double(load(s.bootstrap, cursor.index)) : 0.0;
    map = {through(map, boot), 0.0};
  }
  if (threadIdx.x == 0) maps[j] = map;
}

template <bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? 4 : 2)
    spans_kernel(const ScanArgs s, int64_t span, const ScanMap* maps) {
  __shared__ ScanMap shared[2][kMaxWarps];
  const Group<true> group{kThreads, int(threadIdx.x), shared};
  const int64_t j = blockIdx.x, begin = j * span, end = min(begin + span, s.seqs.tokens);
  // the W of the rest of the last sequence, from the maps of its spans
  const auto rest = [&] {
#if defined(KLQ_TUNE) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
    Cursor cursor(s.seqs);
    if (!cursor.seek(end - 1) || cursor.end <= end) return Start{s.lam, 0.0};
    const int64_t stop = min((cursor.end - 1) / span + 1, int64_t(gridDim.x));
    ScanMap all{0, 1}, after;
    int turn = 0;
    for (int64_t i = j + 1; i < stop && all.f != 0; i += kThreads, ++turn) {
      const int64_t mine = i + threadIdx.x;
      ScanMap window{0, 1};
      group.compose_all(mine < stop ? maps[mine] : window, turn, after,
                        [&](int, ScanMap map) { window = compose(map, window); });
      all = compose(all, window);
    }
    __syncthreads();  // `shared` is used again
    return Start{s.lam, all.d};
  };
  scan_range<kPlain, true, true>(s, group, begin, end, chunks_of(end - begin, kThreads), rest);
}

struct Plan {
  int lanes = 0;     // a group of lanes a row, or
  int warps = 0;     // a block of warps a row, or
  int64_t span = 0;  // tokens a block
  int64_t blocks = 0;
};

Plan plan_of(const Sequences& seqs) {
  Plan p;
  const int64_t length = seqs.length, rows = seqs.count, n = seqs.tokens;
#ifdef KLQ_TUNE
  const int force = getenv("KLQ_SPAN") ? atoi(getenv("KLQ_SPAN")) : 0;
  if (force > 0) {
    p.span = kChunk * force;
    p.blocks = (n + p.span - 1) / p.span;
    return p;
  }
  if (force == 0 || seqs.ends)
#endif
    if (seqs.ends || (length > 4096 && rows < 256)) {
      // at most 528 blocks while all of them fit on the device at once, then spans of 16 chunks
      p.span = kChunk * std::clamp<int64_t>((n + 528 * kChunk - 1) / (528 * kChunk), 1, 16);
      p.blocks = (n + p.span - 1) / p.span;
      return p;
    }
  const int64_t steps = chunks_of(length, 1);  // lanes that hold a row at once
  if (steps <= 32) {
    for (p.lanes = 1; p.lanes < steps;) p.lanes *= 2;
    p.blocks = (rows * p.lanes + kLanesBlock - 1) / kLanesBlock;
    return p;
  }
  // as many warps as it takes to fill the device, 8 of them if the rows are few
  for (p.warps = 1; p.warps < kMaxWarps && p.warps * 32 < steps && p.warps * rows < 4096;)
    p.warps *= 2;
  p.blocks = rows;
#ifdef KLQ_TUNE
  if (getenv("KLQ_WARPS")) p.warps = atoi(getenv("KLQ_WARPS"));
#endif
  return p;
}

template <bool kPlain>
void launch(const ScanArgs& args, const Plan& p, ScanMap* maps, cudaStream_t stream) {
  const unsigned blocks = unsigned(p.blocks);
  if (p.lanes) {
    row_lanes_kernel<kPlain><<<blocks, kLanesBlock, 0, stream>>>(args, p.lanes);
  } else if (p.warps) {
    row_block_kernel<kPlain><<<blocks, 32 * p.warps, 0, stream>>>(args);
  } else {
    if (blocks > 1)
      span_maps_kernel<kPlain><<<blocks - 1, kThreads, 0, stream>>>(args, p.span, maps);
#ifdef KLQ_TUNE
    if (getenv("KLQ_PDL") && blocks > 1) {
      cudaLaunchConfig_t c{};
      c.gridDim = blocks, c.blockDim = kThreads, c.stream = stream;
      cudaLaunchAttribute a{};
      a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      a.val.programmaticStreamSerializationAllowed = 1;
      c.attrs = &a, c.numAttrs = 1;
      cudaLaunchKernelEx(&c, spans_kernel<kPlain>, args, p.span, (const ScanMap*)maps);
      return;
    }
#endif
    spans_kernel<kPlain><<<blocks, kThreads, 0, stream>>>(args, p.span, maps);
  }
}

}  // namespace

int64_t scan_scratch(const Sequences& seqs) {
  const Plan p = plan_of(seqs);
  return p.span && p.blocks > 1 ? 2 * p.blocks : 0;
}

cudaError_t launch_scan(const ScanArgs& args, double* scratch, cudaStream_t stream) {
  if (args.seqs.tokens == 0) return cudaSuccess;
  const auto plain = [](const Reals& x) { return !x.data || (x.type == Real::f32 && x.vector); };
  const bool all_plain = plain(args.log_ratios) && plain(args.values) && plain(args.rewards) &&
                         (!args.mask || args.mask_vector) && !args.trace.data &&
                         !args.lam_rows.data && args.outputs_vector;
  ScanMap* maps = reinterpret_cast<ScanMap*>(scratch);
  (all_plain ? launch<true> : launch<false>)(args, plan_of(args.seqs), maps, stream);
  return cudaGetLastError();
}

}  // namespace klq::cuda
