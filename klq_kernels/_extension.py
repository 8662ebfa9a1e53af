# SPDX-License-Identifier: Apache-2.0
"""The one place that loads the compiled module.

Importing `_C` registers every `torch.ops.klq.*` operator. torch is imported first because the
module links against its libraries.
"""

import os
from pathlib import Path

import torch

_REMEDY = "pip install --no-build-isolation -e ."

if os.environ.get("KLQ_CPU_ISA", "avx512") not in ("baseline", "avx2", "avx512"):
    raise ValueError(
        "klq_kernels: KLQ_CPU_ISA must be baseline, avx2 or avx512, got "
        f"{os.environ['KLQ_CPU_ISA']!r}"
    )

try:
    from klq_kernels import _C
except ImportError as error:
    _root = Path(__file__).resolve().parent.parent
    if "libtorch_cuda" in str(error) or "undefined symbol" in str(error):
        raise ImportError(
            "klq_kernels: the compiled module was built for another torch "
            f"(this is torch {torch.__version__}, CUDA {torch.version.cuda}): {error}. "
            f"Rebuild it with `{_REMEDY}` from the source tree."
        ) from error
    if (_root / "setup.py").exists():
        raise ImportError(
            f"klq_kernels: the source tree at {_root} is on the import path but holds no compiled "
            f"module ({error}). Run `{_REMEDY}` there, or leave the directory to use an "
            "installed copy."
        ) from error
    raise ImportError(
        f"klq_kernels: the compiled module is missing or unusable ({error}). "
        "Reinstall with `pip install --no-build-isolation klq`."
    ) from error


# read once: torch.compile cannot trace a call into the module
BUILD_INFO: dict = dict(_C.build_info())


environment_asks = _C.environment_asks


def build_info() -> dict:
    """What the compiled module was built with: torch, compiler, CUDA, architectures, CPU ISA, and
    whether for racecheck (KLQ_RACECHECK)."""
    return dict(BUILD_INFO)
