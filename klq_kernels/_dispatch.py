# SPDX-License-Identifier: Apache-2.0
"""The one table op x backend x device, and the rule that picks a backend from it.

explicit argument > use_backend(...) > KLQ_BACKEND > best available for the tensors' device.
An explicit request that cannot be met raises and says why; nothing falls back in silence.
"""

import os
from contextlib import contextmanager

import torch

from klq_kernels._extension import BUILD_INFO

BACKENDS = ("reference", "cpp", "triton", "cuda")

# op -> backend -> device types it has a kernel for; `reference` is plain PyTorch and runs anywhere.
_CPU, _GPU = ("cpu",), ("cuda",)
TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "token_logprobs": {"cpp": _CPU, "cuda": _GPU},
    "token_log_ratios": {"cpp": _CPU, "cuda": _GPU},
    "token_stats": {"cpp": _CPU, "cuda": _GPU},
    "q_values": {"cpp": _CPU, "cuda": _GPU},
    "boltzmann_values": {"cpp": _CPU, "cuda": _GPU},
    "lambda_returns": {"cpp": _CPU, "cuda": _GPU},
    "gae": {"cpp": _CPU, "cuda": _GPU},
    "klq_targets": {"cpp": _CPU, "cuda": _GPU},
    "klq_loss": {"cpp": _CPU, "cuda": _GPU},
    "linear_token_logprobs": {"cpp": _CPU},
    "linear_token_stats": {"cpp": _CPU},
    "linear_klq_loss": {"cpp": _CPU},
    "place_scores": {"cpp": _CPU, "cuda": _GPU},
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
    if backend == "triton" and not any("triton" in row for row in TABLE.values()):
        return "this version has no Triton kernels"
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
    requested = backend or _override or os.environ.get("KLQ_BACKEND") or None
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
    _known(requested, op)
    if requested == "reference":
        return requested
    if (reason := _missing(requested)) is not None:
        raise RuntimeError(f"{op}: backend {requested!r} is not available: {reason}")
    if device.type not in kernels.get(requested, ()):
        have = ["reference", *(b for b, devices in kernels.items() if device.type in devices)]
        raise RuntimeError(
            f"{op}: backend {requested!r} has no kernel for {device.type} tensors; "
            f"available there: {', '.join(have)}"
        )
    if dtype == torch.float64 and requested in _NO_FLOAT64:
        raise RuntimeError(
            f"{op}: backend {requested!r} has no float64; use float32 inputs or backend='reference'"
        )
    return requested
