// SPDX-License-Identifier: Apache-2.0
// Instantiates the scan once per instruction set and picks one at run time.
#include <algorithm>

#include "cpu/lambda_returns.h"
#include "cpu/math.h"

namespace klq {

namespace baseline {
#include "cpu/lambda_returns_isa.h"
}  // namespace baseline

#ifdef KLQ_X86_TARGETS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu/lambda_returns_isa.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
namespace avx512 {
#include "cpu/lambda_returns_isa.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

template <class W>
ScanFunction<W> scan_function() {
#ifdef KLQ_X86_TARGETS
  if (isa() == Isa::avx512) return avx512::scan_any<W>;
  if (isa() == Isa::avx2) return avx2::scan_any<W>;
#endif
  return baseline::scan_any<W>;
}
template ScanFunction<float> scan_function<float>();
template ScanFunction<double> scan_function<double>();

}  // namespace klq
