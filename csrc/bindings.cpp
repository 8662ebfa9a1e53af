// SPDX-License-Identifier: Apache-2.0
// The Python module klq_kernels._C. Loading it registers the operators; all it exports is what it
// was built with.
#include <pybind11/pybind11.h>

#include "cpu/math.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
    info["torch"] = KLQ_TORCH_VERSION;
    info["compiler"] = __VERSION__;
#ifdef USE_CUDA
    info["cuda"] = py::str(KLQ_CUDA_VERSION);
#else
    info["cuda"] = py::none();
#endif
    info["archs"] = KLQ_CUDA_ARCHS;
    info["cpu_isa"] = klq::isa_name();
#ifdef KLQ_RACECHECK
    info["racecheck"] = true;
#else
    info["racecheck"] = false;
#endif
    return info;
  });
}
