# SPDX-License-Identifier: Apache-2.0
"""Registers operators: what torch.compile knows of them, and their Triton twins.

csrc/ops.cpp defines torch.ops.klq; torch.ops.klq_triton has the same names, the same schemas and
the same fakes, and imports Triton at the first call of a kernel. Twins are `define` + `impl` + a
handwritten fake: a `triton_op` fails opcheck in the interpreter.
"""

from functools import cache, partial
from importlib import import_module

import torch

from klq_kernels._dispatch import INTERPRET

_DEVICES = ("cpu", "cuda") if INTERPRET else ("cuda",)
_LIBRARIES: list[torch.library.Library] = []
_MODULES: dict[str, str] = {}  # operator -> module of its Triton kernels


@cache
def kernel(name: str):
    """The Triton twin of operator `name`; imports Triton."""
    return getattr(import_module(_MODULES[name]), name)


def fake(name: str, *, differentiable: bool = True):
    """Decorates what torch.compile sees of klq::`name`, in klq_kernels/<op>/__init__.py; the twin's
    kernel is the function `name` of klq_kernels/<op>/triton.py.

    differentiable=False: autograd passes the operator by, which costs a call nothing where
    `torch.no_grad` around it takes over a microsecond.
    """

    def register(function):
        _MODULES[name] = f"{function.__module__}.triton"

        def twin(*args):
            return kernel(name)(*args)

        schema = str(getattr(torch.ops.klq, name).default._schema).removeprefix("klq::")
        torch.library.define(f"klq_triton::{name}", schema.removeprefix(name))
        torch.library.impl(f"klq_triton::{name}", _DEVICES, twin)
        for namespace in ("klq", "klq_triton"):
            torch.library.register_fake(f"{namespace}::{name}", function)
            if not differentiable:
                library = torch.library.Library(namespace, "IMPL")
                library.impl(name, torch.library.fallthrough_kernel, "Autograd")
                _LIBRARIES.append(library)  # its registrations end with it
        return function

    return register


def composite(name: str, schema: str):
    """Decorates an operator that is made of others, in Python: its first argument is the backend
    whose row operators it calls."""

    def register(function):
        for namespace, backend, devices in (
            ("klq", "cpp", ("cpu", "cuda")),
            ("klq_triton", "triton", _DEVICES),
        ):
            torch.library.define(f"{namespace}::{name}", schema)
            torch.library.impl(f"{namespace}::{name}", devices, partial(function, backend))
        return function

    return register


def composite_fake(name: str):
    """Decorates what torch.compile sees of a composite; it too gets the backend first."""

    def register(function):
        for namespace, backend in (("klq", "cpp"), ("klq_triton", "triton")):
            torch.library.register_fake(f"{namespace}::{name}", partial(function, backend))
        return function

    return register
