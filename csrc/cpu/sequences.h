// SPDX-License-Identifier: Apache-2.0
// Where sequences begin and end, padded [..., T] or packed [N] with cu_seqlens, and the scan over
// all of them; shared by lambda_returns, gae and klq_targets.
#pragma once
#include "cpu/glue.h"
#include "cpu/lambda_returns.h"
#include "scan_shapes.h"

namespace klq {

struct Sequences {
  int64_t count = 0, length = 0, tokens = 0;
  Array<int64_t> ends;  // cu_seqlens; null when padded

  Sequences(const char* op, const Tensor& x, const MaybeTensor& cu_seqlens) {
    tokens = x.numel();
    if (cu_seqlens) {
      ends = ids(op, "cu_seqlens", *cu_seqlens, -1);
      count = cu_seqlens->numel() - 1;
      KLQ_CHECK(op, count >= 0 && x.dim() == 1, "cu_seqlens goes with packed [N] inputs");
    } else {
      KLQ_CHECK(op, x.dim() >= 1, "expected [..., T]");
      length = x.size(x.dim() - 1);
      count = length ? tokens / length : 0;
    }
  }
  // elements a per-sequence input must have; -1 (any) for rows of no tokens
  int64_t per_sequence() const { return length || ends ? count : -1; }
  // clamped, so that ends nobody checked cannot leave the buffers
  int64_t begin(int64_t s) const {
    return ends ? std::clamp<int64_t>(ends[s], 0, tokens) : s * length;
  }
  int64_t size(int64_t s) const {
    return ends ? std::max<int64_t>(0, begin(s + 1) - begin(s)) : length;
  }
};

template <class W>
void scan_all(const Scan<W>& scan_args, const Sequences& seqs, double lam, const Array<W>& lam_rows,
              const Array<W>& bootstrap) {
  constexpr int K = kScanRows;
  const ScanFunction<W> scan = scan_function<W>();
  if (seqs.ends) {  // tokens in no sequence
    for (W* out : {scan_args.q, scan_args.advantages, scan_args.returns})
      if (out) std::fill(out, out + seqs.tokens, W(0));
  }
  const int64_t mean = seqs.tokens / std::max<int64_t>(1, seqs.count);
  const int64_t rows = K * std::max<int64_t>(1, 8192 / std::max<int64_t>(1, K * mean));
  torch::stable::parallel_for(0, seqs.count, rows, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last;) {
      const int k = !seqs.ends && last - s >= K ? K : 1;
      int64_t begin[K];
      double l[K], carry[K];
      for (int j = 0; j < k; ++j) {
        begin[j] = seqs.begin(s + j);
        l[j] = lam_rows ? double(lam_rows[s + j]) : lam;
        carry[j] = bootstrap ? double(bootstrap[s + j]) : 0.0;
      }
      scan(k, scan_args, begin, seqs.size(s), l, carry);
      s += k;
    }
  });
}

}  // namespace klq
