# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles ahead of time for NVIDIA and AMD GPUs, without one, and spills no
register; what it takes is printed (and recorded by benchmarks/triton_resources.py)."""

import os
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.fixture
def resources(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton_resources

    yield triton_resources
    sys.modules.pop("triton_resources")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spills(resources, target):
    found = resources.unique(resources.launches())
    kernels = {x.kernel.__name__ for x in found}
    assert len(kernels) >= 12
    for x in found:
        made = resources.compile(x, resources.TARGETS[target])
        print(f"{target} {x.kernel.__name__} ({x.what}): {made}")
        assert made.spills == 0, f"{x.kernel.__name__} ({x.what}): {made}"
        assert made.shared <= 64 << 10, f"{x.kernel.__name__} ({x.what}): {made}"
        if x.kernel.__name__ in ("logprobs_kernel", "klq_loss_kernel", "backward_kernel"):
            assert made.vectors, f"{x.kernel.__name__} reads element by element"


@pytest.mark.parametrize(
    ("dtype", "width", "scaling"),
    [
        (torch.float32, 50304, (0.7, 0.0)),
        (torch.float16, 151936, (0.7, 30.0)),
        (torch.bfloat16, 50257, (1.0, 0.0)),
    ],
)
def test_other_dtypes_widths_and_scalings(resources, dtype, width, scaling):
    for x in resources.unique(resources.launches(dtype, width, scaling=scaling)):
        if "scan" in x.kernel.__name__ or x.kernel.__name__ in ("rows_kernel", "tile_map_kernel"):
            continue  # no logits in them
        made = resources.compile(x, resources.TARGETS["sm_90"])
        assert made.spills == 0, f"{x.kernel.__name__} ({x.what}): {made}"
