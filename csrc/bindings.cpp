// SPDX-License-Identifier: Apache-2.0
// The Python module klq_kernels._C. Loading it registers the operators; it exports what it was
// built with and what the environment asks for.
#include <pybind11/pybind11.h>

#include <cstdlib>

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
  // whether calls must be looked at: os.environ takes over a microsecond for the two
  m.def("environment_asks", [] {
    return std::getenv("KLQ_BACKEND") != nullptr || std::getenv("KLQ_VALIDATE") != nullptr;
  });
}
