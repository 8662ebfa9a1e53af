# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: poisoned memory, fixed seeds, GPU tests only where there is a GPU.

`torch.use_deterministic_algorithms` fills fresh memory with NaN, so an output element that a kernel
forgets to write fails the test that reads it.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # oracle.py, workers of the tests


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    # a few GPU ops of the plain PyTorch oracle have no deterministic form: warn there
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param
