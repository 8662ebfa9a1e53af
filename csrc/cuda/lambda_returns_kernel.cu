// SPDX-License-Identifier: Apache-2.0
// The regimes of the reverse scan, chosen from shapes only.
//
// Short rows, or enough of them to fill the device: a group of lanes or a block a row. Few long
// rows, and everything packed: flat spans of tokens, a block a span, in two launches. The first
// writes each span's map (only of its part that the span to its left needs), the second composes
// the maps right of a span in fixed order and scans the span. Nobody waits for a neighbour, nothing
// needs to be zero before, and short sequences cost the first launch almost no reading.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/scan.cuh"

namespace klq::cuda {
namespace {

constexpr int kSpanWarps = 8, kSpanThreads = 32 * kSpanWarps;
constexpr int64_t kSpanChunk = kSpanThreads * kLaneTokens;
constexpr int kLanesBlock = 128;

// A launch may overlap the end of the one before it (sm_90): it waits here before it needs it, ...
__device__ void previous_done() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
// ... and lets the next one begin, which waits in the same way: 0.3 µs of the launch are hidden.
__device__ void next_may_begin() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <bool kPlain>
__global__ void __launch_bounds__(kLanesBlock, kPlain ? 6 : 4)
    row_lanes_kernel(const ScanArgs s, int lanes) {
  previous_done();
  next_may_begin();
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
  next_may_begin();
  const Group<kWarps> group{32 * kWarps, int(threadIdx.x), maps};
  const int64_t length = s.seqs.length, begin = blockIdx.x * length;
  scan_sequence<kPlain>(s, group, blockIdx.x, begin, begin + length,
                        chunks_of(length, 32 * kWarps));
}

// Span j of packed tokens or, with `parts` spans a row, of rows: these never leave their row.
struct Span {
  int64_t begin, end;

  __device__ Span(const Sequences& seqs, int64_t size, int parts, int64_t j) {
    const int64_t row = parts ? j / parts : 0, first = row * seqs.length;
    begin = first + (parts ? j % parts : j) * size;
    end = min(begin + size, parts ? first + seqs.length : seqs.tokens);
  }
};

// maps[j]: span j up to the end of the sequence it begins in, if that began before the span. Its
// bootstrap is folded in where it ends here.
template <bool kPlain>
__global__ void __launch_bounds__(kSpanThreads, kPlain ? 4 : 2)
    span_maps_kernel(const ScanArgs s, int64_t size, int parts, ScanMap* maps) {
  __shared__ ScanMap shared[2][kSpanWarps];
  const Group<kSpanWarps> group{kSpanThreads, int(threadIdx.x), shared};
  previous_done();
  next_may_begin();
  const Span span(s.seqs, size, parts, blockIdx.x);
  Cursor cursor(s.seqs);
  if (!cursor.seek_far(span.begin) || cursor.begin == span.begin) return;
  const int64_t end = min(span.end, cursor.end);
  ScanMap map = scan_range<kPlain, false, false>(
      s, group, span.begin, end, chunks_between(span.begin, end, kSpanThreads), [&] {
        return Start{s.lam_rows.data ? double(load(s.lam_rows, cursor.index)) : s.lam, 0.0, cursor};
      });
  if (cursor.end <= span.end) {
    const double boot = s.bootstrap.data ? double(load(s.bootstrap, cursor.index)) : 0.0;
    map = {through(map, boot), 0.0};
  }
  if (threadIdx.x == 0) maps[blockIdx.x] = map;
}

template <bool kPlain, bool kPacked>
__global__ void __launch_bounds__(kSpanThreads, kPlain ? (kPacked ? 3 : 4) : 2)
    spans_kernel(const ScanArgs s, int64_t size, int parts, const ScanMap* maps) {
  __shared__ ScanMap shared[2][kSpanWarps];
  const Group<kSpanWarps> group{kSpanThreads, int(threadIdx.x), shared};
  const Span span(s.seqs, size, parts, blockIdx.x);
  // the W of the rest of the last sequence, from the maps of its spans
  const auto rest = [&] {
    Start start{s.lam, 0.0, Cursor(s.seqs)};
    const Cursor& last = start.cursor;
    const bool inside = start.cursor.seek_far(span.end - 1);
    if (!kPacked && s.lam_rows.data) start.lam = double(load(s.lam_rows, last.index));
    if (!kPacked && s.bootstrap.data) start.carry = double(load(s.bootstrap, last.index));
    previous_done();  // the maps are written
    if (!inside || last.end <= span.end) return start;
    const int64_t rest_of_row = (last.index + 1) * parts,
                  rest_of_tokens = (last.end - 1) / size + 1;
    const int64_t stop = min(kPacked ? rest_of_tokens : rest_of_row, int64_t(gridDim.x));
    ScanMap all{0, 1};
    int turn = 0;
    for (int64_t i = blockIdx.x + 1; i < stop && all.f != 0; i += kSpanThreads, ++turn) {
      const int64_t mine = i + threadIdx.x;
      all = compose(all, group.total(mine < stop ? maps[mine] : ScanMap{0, 1}, turn));
    }
    __syncthreads();  // `shared` is used again
    start.carry = all.d;
    return start;
  };
  scan_range<kPlain, kPacked, true>(s, group, span.begin, span.end,
                                    chunks_between(span.begin, span.end, kSpanThreads), rest);
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
void run(const ScanArgs& args, const ScanPlan& p, ScanMap* maps, cudaStream_t stream, bool early) {
  if (p.lanes) {
    launch(row_lanes_kernel<kPlain>, p.blocks, kLanesBlock, stream, early, args, p.lanes);
  } else if (p.warps == 4) {
    launch(row_block_kernel<kPlain, 4>, p.blocks, 128, stream, early, args);
  } else if (p.warps) {
    launch(row_block_kernel<kPlain, 8>, p.blocks, 256, stream, early, args);
  } else {
    const bool two = p.blocks > 1;
    if (two)
      launch(span_maps_kernel<kPlain>, p.blocks, kSpanThreads, stream, early, args, p.span, p.parts,
             maps);
    // it reads before it waits, which only the launch above has made safe
    launch(p.parts ? spans_kernel<kPlain, false> : spans_kernel<kPlain, true>, p.blocks,
           kSpanThreads, stream, early && two, args, p.span, p.parts, maps);
  }
}

}  // namespace

// The numbers were measured on one H200 (132 SMs, 2026-11-22): a step of 1024 tokens costs a block
// about a microsecond, and a second launch two.
ScanPlan plan_scan(const Sequences& seqs) {
  ScanPlan p;
  const int64_t length = seqs.length, rows = seqs.count;
  const int64_t steps = seqs.ends ? 0 : chunks_of(length, 1);  // lanes that hold a row at once
  const bool few = steps > 1024 && rows < 256;
  if (seqs.ends || few) {
    // no more blocks than are there at once (3 or 4 an SM), until spans have 16 chunks
    const int64_t chunks = (seqs.tokens + kSpanChunk - 1) / kSpanChunk;
    const int64_t blocks = few ? 528 : 396;
    p.span = kSpanChunk * std::clamp<int64_t>((chunks + blocks - 1) / blocks, 1, 16);
    p.parts = few ? int((length + p.span - 1) / p.span) : 0;
    p.blocks = few ? rows * p.parts : (seqs.tokens + p.span - 1) / p.span;
    p.scratch = p.blocks > 1 ? 2 * p.blocks : 0;
  } else if (steps <= 32) {
    for (p.lanes = 1; p.lanes < steps;) p.lanes *= 2;
    p.blocks = (rows * p.lanes + kLanesBlock - 1) / kLanesBlock;
  } else {
    p.warps = steps <= 128 || rows >= 1024 ? 4 : 8;
    p.blocks = rows;
  }
  return p;
}

cudaError_t launch_scan(const ScanArgs& args, const ScanPlan& plan, double* scratch,
                        cudaStream_t stream) {
  if (args.seqs.tokens == 0) return cudaSuccess;
  Device device;
  if (cudaError_t e = this_device(&device)) return e;
  const bool early = device.major >= 9;  // launches may overlap the end of the one before
  const auto plain = [](const Reals& x) { return !x.data || (x.type == Type::f32 && x.vector); };
  const bool all_plain = plain(args.log_ratios) && plain(args.values) && plain(args.rewards) &&
                         (!args.mask || args.mask_vector) && !args.trace.data &&
                         !args.lam_rows.data && args.outputs_vector;
  (all_plain ? run<true> : run<false>)(args, plan, reinterpret_cast<ScanMap*>(scratch), stream,
                                       early);
  return cudaGetLastError();
}

}  // namespace klq::cuda
