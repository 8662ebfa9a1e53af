# SPDX-License-Identifier: Apache-2.0
"""The one table op x backend x device, and the rule that picks a backend from it.

explicit argument > use_backend(...) > KLQ_BACKEND > best available for the tensors' device.
An explicit request that cannot be met raises and says why; nothing falls back in silence.
"""

import importlib.util
import os
from contextlib import contextmanager

import torch

from klq_kernels._extension import BUILD_INFO, environment_asks

BACKENDS = ("reference", "cpp", "triton", "cuda")

# Triton's interpreter runs on the CPU, slowly: only when asked, in the environment before import.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_CUDA = BUILD_INFO["cuda"] is not None
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not imported

# op -> backend -> device types it has a kernel for; `reference` is plain PyTorch and runs anywhere.
_CPU, _GPU = ("cpu",), ("cuda",)
_TRITON = ("cuda", "cpu") if INTERPRET else _GPU
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "token_logprobs": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "token_log_ratios": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "token_stats": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "q_values": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "boltzmann_values": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "lambda_returns": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "gae": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "klq_targets": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "klq_loss": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "linear_token_logprobs": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "linear_token_stats": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "linear_klq_loss": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
    "place_scores": {"cpp": _CPU, "cuda": _GPU, "triton": _TRITON},
}
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

_override: str | None = None  # set by use_backend


def _missing(backend: str) -> str | None:
    """Why `backend` cannot run here at all; None if it can."""
    if backend == "cuda":
        if not BUILD_INFO["cuda"]:
            return "klq was built without CUDA; rebuild with KLQ_CUDA=1 and a CUDA build of torch"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    if backend == "triton" and not _HAS_TRITON:
        return "Triton is not installed; pip install 'triton>=3.6'"
    return None


def available_backends() -> dict[str, bool | str]:
    """Backend -> True, or the reason why it cannot be used in this process."""
    return {b: _missing(b) or True for b in BACKENDS}


def _known(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {backend!r}; choose one of {BACKENDS}")
    return backend


@contextmanager
def use_backend(backend: str):
    """Every op inside the `with` block uses `backend` ("reference" | "cpp" | "triton" | "cuda").

    The order everywhere: `backend=` argument > use_backend > the environment variable KLQ_BACKEND >
    the best available for the tensors' device (CUDA: cuda, triton, reference; CPU: cpp, reference).
    Process-wide, not per thread. A compiled graph keeps the backend it was traced with.
    """
    global _override
    previous, _override = _override, _known(backend, "use_backend")
    try:
        yield
    finally:
        _override = previous


def at_once(backend: str | None, values, mask, cu_seqlens) -> bool:
    """Whether a scan's compiled operator may be called before anybody looks at its tensors.

    It compares what the careful checks compare, at a fraction of their price, and refuses before
    any launch; they then say why. Not where another backend may be meant, where a graph is traced
    or where values are to be looked at (`cu_seqlens` on the CPU, KLQ_VALIDATE); a mask of integers
    has to be converted first.
    """
    return (
        backend is None
        and _override is None
        and type(values) is torch.Tensor
        and (mask is None or (type(mask) is torch.Tensor and mask.dtype is torch.bool))
        and (_HAS_CUDA if values.is_cuda else values.is_cpu and cu_seqlens is None)
        and not torch.compiler.is_compiling()
        and not environment_asks()
    )


_chosen: dict[tuple, str] = {}  # what `resolve` found best, by its arguments

_NO_FLOAT64 = ("triton", "cuda")  # float64 exists for oracles: reference and cpp have it


def resolve(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
) -> str:
    """The backend that runs `op` on `device` with results of `dtype`.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: the requested backend has no kernel for this op, device and dtype, with the
            remedy.
    """
    # `in` first: a get of what is not there takes a microsecond
    wanted = "KLQ_BACKEND" in os.environ and os.environ["KLQ_BACKEND"]
    requested = backend or _override or wanted or None
    kernels = TABLE[op]
    if requested is None:
        # the choice below costs some calls more than their launch; a key is never chosen otherwise
        choice = _chosen.get(key := (op, device.type, dtype))
        if choice is not None:
            return choice
        for candidate in _PREFERENCE.get(device.type, ("reference",)):
            if candidate == "reference" or (
                device.type in kernels.get(candidate, ())
                and not (dtype == torch.float64 and candidate in _NO_FLOAT64)
                and _missing(candidate) is None
            ):
                _chosen[key] = candidate
                return candidate
    _known(requested, op if backend or _override else f"{op}: KLQ_BACKEND")
    if requested == "reference":
        return requested
    if (reason := _missing(requested)) is not None:
        raise RuntimeError(f"{op}: backend {requested!r} is not available: {reason}")
    if device.type not in kernels.get(requested, ()):
        have = ["reference", *(b for b, devices in kernels.items() if device.type in devices)]
        remedy = ""
        if requested == "triton" and device.type == "cpu":
            remedy = "; set TRITON_INTERPRET=1 before Python starts for Triton's interpreter"
        raise RuntimeError(
            f"{op}: backend {requested!r} has no kernel for {device.type} tensors; "
            f"available there: {', '.join(have)}{remedy}"
        )
    if dtype == torch.float64 and requested in _NO_FLOAT64:
        raise RuntimeError(
            f"{op}: backend {requested!r} has no float64; use float32 inputs or backend='reference'"
        )
    return requested


def operator(backend: str, name: str):
    """The operator `name` of a compiled backend: torch.ops.klq has C++ and CUDA, chosen by the
    tensors' device, torch.ops.klq_triton the Triton twins."""
    namespace = torch.ops.klq_triton if backend == "triton" else torch.ops.klq
    return getattr(namespace, name).default
