# SPDX-License-Identifier: Apache-2.0
"""CUDA sources compile everywhere nvcc is, also under a torch without CUDA, and do not spill."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
GLUE = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
# what torch's own extension builder passes: a kernel that needs the conversions would fail there
TORCH_DEFINES = [
    f"-D__CUDA_NO_{name}__"
    for name in (
        "HALF_OPERATORS",
        "HALF_CONVERSIONS",
        "HALF2_OPERATORS",
        "BFLOAT16_CONVERSIONS",
    )
]

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")


def cuda_home() -> Path:
    """The toolkit nvcc itself reports; the one on PATH may be a wrapper script."""
    dry = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    return Path(re.search(r"TOP=(\S+)", dry.stderr).group(1))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda p: p.stem)
def test_kernel_compiles_without_spills(kernel, arch, tmp_path):
    out = subprocess.run(
        [
            *(NVCC, f"-arch={arch}", "-std=c++20", "-O3", f"-I{ROOT}/csrc", *TORCH_DEFINES),
            *("--Werror", "all-warnings", "-Xptxas", "-v,-warn-spills"),
            *("-cubin", "-o", str(tmp_path / "k.cubin"), str(kernel)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert out.returncode == 0, out.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", out.stderr)
    assert spills, out.stderr
    assert all(s == ("0", "0") for s in spills), out.stderr


@pytest.mark.parametrize("glue", GLUE, ids=lambda p: p.stem)
def test_glue_compiles(glue):
    includes = [ROOT / "csrc", cuda_home() / "include", *cpp_extension.include_paths()]
    out = subprocess.run(
        [
            *("g++", "-std=c++20", "-fvisibility=hidden", "-fsyntax-only", "-Wall", "-Werror"),
            *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
            *[f"-isystem{i}" if "torch" in str(i) else f"-I{i}" for i in includes],
            str(glue),
        ],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert out.returncode == 0, out.stderr
    assert torch.__version__  # the headers of this torch
