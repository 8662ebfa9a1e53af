// SPDX-License-Identifier: Apache-2.0
// The regimes of the reverse scan, chosen from shapes only.
//
// Short rows, or enough of them to fill the device: a group of lanes or a block a row. Few long
// rows, and everything packed: flat spans of tokens, a block a span, in two launches. The first
// writes each span's map (only of its part that the span to its left needs), the second composes
// the maps right of a span in fixed order and scans the span. Nobody waits for a neighbour, nothing
// needs to be zero before, and short sequences cost the first launch almost no reading.
#include <algorithm>

#include "cuda/scan.cuh"

namespace klq::cuda {
namespace {

constexpr int kSpanWarps = 8, kSpanThreads = 32 * kSpanWarps;
constexpr int64_t kSpanChunk = kSpanThreads * kLaneTokens;
constexpr int kLanesBlock = 128;
constexpr int kBlocks = 396;  // 3 an SM of an H200: what is there at once

// A launch may overlap the end of the one before it (sm_90): it waits here before it needs it, ...
__device__ void previous_done() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
// ... and lets the next one begin, which waits in the same way.
__device__ void next_may_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <bool kPlain>
__global__ void __launch_bounds__(kLanesBlock, kPlain ? 6 : 4)
    row_lanes_kernel(const ScanArgs s, int lanes) {
  previous_done();
  const int64_t row = (int64_t(blockIdx.x) * kLanesBlock + threadIdx.x) / lanes;
  const Group<0> group{lanes, int(threadIdx.x) % lanes};
  const int64_t length = s.seqs.length, begin = row * length;
  scan_sequence<kPlain>(s, group, row, begin, begin + length, chunks_of(length, lanes));
}

template <bool kPlain, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, (kPlain ? 32 : 16) / kWarps)
    row_block_kernel(const ScanArgs s) {
  __shared__ ScanMap maps[2][kWarps];
  previous_done();
  const Group<kWarps> group{32 * kWarps, int(threadIdx.x), maps};
  const int64_t length = s.seqs.length, begin = blockIdx.x * length;
  scan_sequence<kPlain>(s, group, blockIdx.x, begin, begin + length,
                        chunks_of(length, 32 * kWarps));
}

// maps[j]: span j up to the end of the sequence it begins in, if that began before the span. Its
// bootstrap is folded in where it ends here.
template <bool kPlain>
__global__ void __launch_bounds__(kSpanThreads, kPlain ? 4 : 2)
    span_maps_kernel(const ScanArgs s, int64_t span, ScanMap* maps) {
  __shared__ ScanMap shared[2][kSpanWarps];
  const Group<kSpanWarps> group{kSpanThreads, int(threadIdx.x), shared};
  previous_done();
  next_may_begin();
  const int64_t j = blockIdx.x + 1, begin = j * span;
  Cursor cursor(s.seqs);
  if (!cursor.seek_far(begin) || cursor.begin == begin) return;
  const int64_t edge = min(begin + span, s.seqs.tokens), end = min(edge, cursor.end);
  ScanMap map = scan_range<kPlain, false, false>(
      s, group, begin, end, chunks_of(end - begin, kSpanThreads), [&] {
        return Start{s.lam_rows.data ? double(load(s.lam_rows, cursor.index)) : s.lam, 0.0, cursor};
      });
  if (cursor.end <= edge) {
    const double boot = s.bootstrap.data ? double(load(s.bootstrap, cursor.index)) : 0.0;
    map = {through(map, boot), 0.0};
  }
  if (threadIdx.x == 0) maps[j] = map;
}

template <bool kPlain>
__global__ void __launch_bounds__(kSpanThreads, kPlain ? 3 : 2)
    spans_kernel(const ScanArgs s, int64_t span, const ScanMap* maps) {
  __shared__ ScanMap shared[2][kSpanWarps];
  const Group<kSpanWarps> group{kSpanThreads, int(threadIdx.x), shared};
  const int64_t j = blockIdx.x, begin = j * span, end = min(begin + span, s.seqs.tokens);
  // the W of the rest of the last sequence, from the maps of its spans
  const auto rest = [&] {
    Start start{s.lam, 0.0, Cursor(s.seqs)};
    const Cursor& last = start.cursor;
    const bool inside = start.cursor.seek_far(end - 1);
    previous_done();  // the maps are written
    if (!inside || last.end <= end) return start;
    const int64_t stop = min((last.end - 1) / span + 1, int64_t(gridDim.x));
    ScanMap all{0, 1};
    int turn = 0;
    for (int64_t i = j + 1; i < stop && all.f != 0; i += kSpanThreads, ++turn) {
      const int64_t mine = i + threadIdx.x;
      all = compose(all, group.total(mine < stop ? maps[mine] : ScanMap{0, 1}, turn));
    }
    __syncthreads();  // `shared` is used again
    start.carry = all.d;
    return start;
  };
  scan_range<kPlain, true, true>(s, group, begin, end, chunks_of(end - begin, kSpanThreads), rest);
}

// Whether the device has clusters and launches that overlap the end of the one before.
bool hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            bool early, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = unsigned(blocks), config.blockDim = threads, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = early;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);  // reported by cudaGetLastError
}

template <bool kPlain>
void run(const ScanArgs& args, const ScanPlan& p, ScanMap* maps, cudaStream_t stream) {
  bool early = hopper();
#ifdef KLQ_TUNE
  static const char* const pdl = getenv("KLQ_PDL");
  const bool first = early && pdl && *pdl == '2';
  early = early && pdl && *pdl >= '1';
#endif
  if (p.lanes) {
    launch(row_lanes_kernel<kPlain>, p.blocks, kLanesBlock, stream, first, args, p.lanes);
  } else if (p.warps == 4) {
    launch(row_block_kernel<kPlain, 4>, p.blocks, 128, stream, first, args);
  } else if (p.warps) {
    launch(row_block_kernel<kPlain, 8>, p.blocks, 256, stream, first, args);
  } else {
    if (p.blocks > 1)
      launch(span_maps_kernel<kPlain>, p.blocks - 1, kSpanThreads, stream, first, args, p.span,
             maps);
    launch(spans_kernel<kPlain>, p.blocks, kSpanThreads, stream, early && p.blocks > 1, args,
           p.span, maps);
  }
}

}  // namespace

ScanPlan plan_scan(const Sequences& seqs) {
  ScanPlan p;
  const int64_t length = seqs.length, rows = seqs.count, n = seqs.tokens;
  const bool few = !seqs.ends && length > 4096 && rows < 256;
#ifdef KLQ_TUNE
  static const char* const warps = getenv("KLQ_WARPS");
  static const char* const chunks = getenv("KLQ_CHUNKS");
#endif
  if (seqs.ends || few) {
    // no more blocks than are there at once, until spans have 16 chunks
    p.span = kSpanChunk *
             std::clamp<int64_t>((n + kBlocks * kSpanChunk - 1) / (kBlocks * kSpanChunk), 1, 16);
#ifdef KLQ_TUNE
    if (chunks) p.span = kSpanChunk * atoi(chunks);
#endif
    p.blocks = (n + p.span - 1) / p.span;
    p.scratch = p.blocks > 1 ? 2 * p.blocks : 0;
    return p;
  }
  const int64_t steps = chunks_of(length, 1);  // lanes that hold a row at once
  if (steps <= 32) {
    for (p.lanes = 1; p.lanes < steps;) p.lanes *= 2;
    p.blocks = (rows * p.lanes + kLanesBlock - 1) / kLanesBlock;
    return p;
  }
  p.warps = steps <= 128 || rows >= 1024 ? 4 : 8;
#ifdef KLQ_TUNE
  if (warps) p.warps = atoi(warps);
#endif
  p.blocks = rows;
  return p;
}

cudaError_t launch_scan(const ScanArgs& args, const ScanPlan& plan, double* scratch,
                        cudaStream_t stream) {
  if (args.seqs.tokens == 0) return cudaSuccess;
  const auto plain = [](const Reals& x) { return !x.data || (x.type == Real::f32 && x.vector); };
  const bool all_plain = plain(args.log_ratios) && plain(args.values) && plain(args.rewards) &&
                         (!args.mask || args.mask_vector) && !args.trace.data &&
                         !args.lam_rows.data && args.outputs_vector;
  (all_plain ? run<true> : run<false>)(args, plan, reinterpret_cast<ScanMap*>(scratch), stream);
  return cudaGetLastError();
}

}  // namespace klq::cuda
