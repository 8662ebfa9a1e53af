# SPDX-License-Identifier: Apache-2.0
"""Builds the one compiled module, klq_kernels._C: sources and flags, nothing else.

KLQ_CUDA=auto|0|1       CUDA kernels: if torch and the toolkit have CUDA (auto), never, or must
TORCH_CUDA_ARCH_LIST    GPU architectures, default 8.0;9.0a;10.0+PTX
MAX_JOBS                parallel compilations
KLQ_SANITIZE=address,undefined      instrumented CPU build
KLQ_RACECHECK=1         CUDA kernels for compute-sanitizer's racecheck (csrc/cuda/hopper.cuh)
"""

import os
from pathlib import Path

from setuptools import setup

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as missing:
    if missing.name not in ("torch", "pybind11"):
        raise
    raise SystemExit(
        f"klq: building it needs {missing.name}; first pip install torch pybind11 ninja, or leave "
        "out --no-build-isolation"
    ) from None

ROOT = Path(__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # stable ABI: runs on torch 2.10 and later


def want_cuda() -> bool:
    """Decided by the toolchain, never by a visible GPU: builders often have none."""
    flag = os.environ.get("KLQ_CUDA", "auto")
    if flag not in ("auto", "0", "1"):
        raise SystemExit(f"klq: KLQ_CUDA must be auto, 0 or 1, got {flag!r}")
    have = bool(torch.version.cuda and cpp_extension.CUDA_HOME)
    if flag == "1" and not have:
        raise SystemExit(
            "klq: KLQ_CUDA=1 needs a CUDA build of torch and nvcc "
            f"(torch.version.cuda={torch.version.cuda}, CUDA_HOME={cpp_extension.CUDA_HOME}); "
            "install both or build with KLQ_CUDA=0"
        )
    return have and flag != "0"


def files(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pat in patterns for p in ROOT.glob(f"csrc/{pat}"))


cuda = want_cuda()
arch_list = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX") if cuda else ""
# fp-contract: ISO mode would forbid the fused multiply-adds the row kernels are written for
cxx = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=fast", TARGET]
cxx += [f"-ffile-prefix-map={ROOT}=klq", f'-DKLQ_CUDA_ARCHS="{arch_list}"']
cxx += [f'-DKLQ_TORCH_VERSION="{torch.__version__}"', f'-DKLQ_CUDA_VERSION="{torch.version.cuda}"']
# where the compiler links libstdc++ statically, its copy must not mix with the one torch loads: an
# error message was then a crash (GCC under CUDA 13.0, 2026-11-23)
link = ["-s", "-Wl,--exclude-libs,ALL"]
if sanitize := os.environ.get("KLQ_SANITIZE"):
    cxx += [f"-fsanitize={sanitize}", "-g1", "-fno-omit-frame-pointer"]
    link = [f"-fsanitize={sanitize}"]

racecheck = ["-DKLQ_RACECHECK"] if os.environ.get("KLQ_RACECHECK") else []
sources = files("*.cpp", "cpu/*.cpp") + (files("cuda/*.cpp", "cuda/*.cu") if cuda else [])
extension = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
    "klq_kernels._C",
    sources,
    include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
    depends=files("**/*.h", "**/*.cuh", "**/*.cpp", "**/*.cu"),
    extra_compile_args={
        "cxx": cxx + (["-DUSE_CUDA"] if cuda else []) + racecheck,
        "nvcc": ["-O3", "-std=c++20", "-lineinfo", "--threads=2", *racecheck],
    },
    extra_link_args=link,
)

setup(ext_modules=[extension], cmdclass={"build_ext": cpp_extension.BuildExtension})
