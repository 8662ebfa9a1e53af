# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: poisoned memory, fixed seeds, GPU tests only where there is a GPU.

`torch.use_deterministic_algorithms` fills fresh memory with NaN, so an output element that a kernel
forgets to write fails the test that reads it.
"""

import sys
from pathlib import Path

import pytest
import torch

from klq_kernels._dispatch import INTERPRET

sys.path.insert(0, str(Path(__file__).parent / "kernels"))  # oracle.py, workers of the tests


if INTERPRET:
    from triton.runtime import interpreter

    patch_lang, patched = interpreter._patch_lang, set()

    def call_device_function(function, *args, **kwargs):
        """A launch patches Triton's language and undoes that at its end. A device function patches
        its module's again at every call, two thirds of the time of a test, and never undoes it: the
        first call is enough."""
        if function.fn.__module__ not in patched:
            patched.add(function.fn.__module__)
            patch_lang(function.fn)
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    interpreter.InterpretedFunction.__call__ = call_device_function


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
