# SPDX-License-Identifier: Apache-2.0
"""Calls of every op for the tests that only a GPU can fail: by load, by stream, by graph."""

from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from oracle import Run, case, flatten, run, upstream_like
from torch import Tensor

from klq_kernels import _dispatch, klq_loss
from klq_kernels._linear_cut import pitch
from klq_kernels._registry import SPECS

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
_SKEWED = (0, 1, 700, 3, 0, 5000, 1024, 0)


class Call(NamedTuple):
    """One way to call an op; `logits` in place is what `klq_loss` alone has, `logits32` an LM head
    with logits in float32, some of whose rows are kept."""

    op: str
    dtype: torch.dtype = F32
    case: str = "plain"
    inplace: bool = False
    logits32: bool = False
    leading: tuple[int, ...] = (3, 5)
    vocabulary: int = 257
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        how = "inplace" if self.inplace else self.case + "-logits32" * self.logits32
        shape = "x".join(map(str, self.leading))
        rows = "" if SPECS[self.op].kind == "scan" else f"x{self.vocabulary}"
        return f"{self.op}-{how}-{shape}{rows}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self, seed: int = 0, device: str | None = None) -> dict:
        size = {"leading": self.leading, "vocabulary": self.vocabulary, "seed": seed}
        if self.lengths is not None:
            size["lengths"] = self.lengths
        made = SPECS[self.op].inputs(device or DEVICE, self.dtype, case(self.case), **size)
        if self.logits32:
            made["logits_dtype"] = F32
            if self.op == "linear_token_logprobs":
                made["keep_bytes"] = 6 * 2 * pitch(self.vocabulary, True)
        return made

    def upstream(self, inputs: dict, backend: str) -> Tensor:
        """Of the first output: random, or 0.5 for a loss, so that its gradient is scaled."""
        out = next(iter(flatten(SPECS[self.op].function(**inputs, backend=backend)).values()))
        return torch.full_like(out, 0.5) if out.dim() == 0 else upstream_like(out)

    def __call__(self, inputs: dict, backend: str, upstream: Tensor) -> Run:
        if not self.inplace:
            return run(SPECS[self.op], inputs, backend, upstream)
        leaves = [inputs[n].detach().requires_grad_() for n in ("logits", "values")]
        args = {**inputs, "logits": leaves[0].clone(), "values": leaves[1]}
        made = klq_loss(**args, inplace=True, backend=backend)
        grads = torch.autograd.grad(made.loss, leaves, upstream)
        outputs = {k: x.detach() for k, x in flatten(made).items()}
        return Run(outputs, dict(zip(("logits", "values"), grads, strict=True)))


def _calls() -> list[Call]:
    out = []
    for op, spec in SPECS.items():
        if spec.kind == "rows":
            out += [
                Call(op, BF16, leading=(16, 9), vocabulary=50304),
                Call(op, F32, "unmasked", leading=(2, 7), vocabulary=100003),
                Call(op, F16, leading=(40, 9), vocabulary=301),
            ]
        elif spec.kind == "targets":
            out += [
                Call(op, BF16, leading=(12, 13), vocabulary=20000),
                Call(op, BF16, "packed", leading=(17,), vocabulary=9000, lengths=(0, 5, 1, 7, 0)),
                Call(op, F32, "lam_rows", leading=(31, 9), vocabulary=301),
            ]
        elif spec.kind == "scan":
            sizes = ((300, 40), (64, 1000), (2, 20000))
            out += [Call(op, leading=size) for size in sizes]
            out.append(Call(op, F32, "packed", leading=(sum(_SKEWED) + 3,), lengths=_SKEWED))
            out.append(Call(op, BF16, leading=(64, 300)))
        else:
            out += [
                Call(op, BF16, leading=(4, 9), vocabulary=4099),
                Call(op, BF16, logits32=True, leading=(4, 9), vocabulary=4099),
                Call(op, BF16, "compacted", logits32=True),
            ]
    out += [  # rings of 1, 2, 4 and 8 blocks a row
        Call("klq_loss", BF16, inplace=True, leading=(16, 9), vocabulary=50304),
        Call("klq_loss", F16, inplace=True, leading=(3, 9), vocabulary=100003),
        Call("klq_loss", F32, inplace=True, leading=(2, 9), vocabulary=151936),
        Call("klq_loss", BF16, "capped", leading=(3, 9), vocabulary=170000),
        Call("klq_loss", F16, inplace=True, leading=(40, 9), vocabulary=301),
    ]
    return out


CALLS = _calls()
# one of each op, and the loss in place: for tests that cost a second a call
FEW = [
    *{c.op: c for c in reversed(CALLS) if not c.inplace}.values(),
    *(c for c in CALLS if c.op in ("lambda_returns", "klq_targets") or c.logits32),
    next(c for c in CALLS if c.inplace),
]
FEW = list(dict.fromkeys(FEW))


def on(backend: str, *values):
    """Parameters that begin with a backend: skipped, with the reason, where it cannot run."""
    ready = _dispatch.available_backends()[backend]
    marks = [] if ready is True else [pytest.mark.skip(reason=ready)]
    return pytest.param(backend, *values, marks=marks)


each_backend = pytest.mark.parametrize("backend", [on(b) for b in BACKENDS])


def differs(a: Run, b: Run) -> Tensor:
    """Whether any bit does, as a tensor: nobody waits for the device."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bad = []
    for x, y in ((a.outputs, b.outputs), (a.grads, b.grads)):
        assert list(x) == list(y)
        for name in x:
            kind = kinds[x[name].element_size()]
            bad.append((x[name].view(kind) != y[name].view(kind)).any())
    return torch.stack(bad).any()


@contextmanager
def no_waiting():
    """A host synchronisation inside raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def as_in_production() -> None:
    """No fills of fresh memory: they would stand between the kernels whose order is tested."""
    torch.use_deterministic_algorithms(False)


class Hog:
    """Products of changing size on a stream of its own, so that blocks start in another order."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.a = [torch.randn(512 << k, 512 << k, device=DEVICE).bfloat16() for k in range(4)]
        self.stream.wait_stream(torch.cuda.current_stream())

    def __call__(self, i: int) -> None:
        with torch.cuda.stream(self.stream):
            for a in (self.a[i % 4], self.a[(i + 1) % 4]):
                torch.mm(a, a)


def capture(step):
    """(replay, results) of `step` captured in a CUDA graph, after two ordinary calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = step()
    # what `step` holds is read by every replay
    return lambda keep=step: graph.replay(), out


def blank(inputs: dict) -> dict:
    """Buffers like the tensors of `inputs`; what is no tensor stays."""
    return {k: torch.empty_like(x) if isinstance(x, Tensor) else x for k, x in inputs.items()}


def fill(buffers: dict, inputs: dict) -> None:
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            buffers[name].copy_(x)


def wipe(buffers: dict) -> None:
    """NaN, id 0 and inactive: what nobody must compute with."""
    for name, x in buffers.items():
        if isinstance(x, Tensor) and name != "cu_seqlens":
            x.fill_(torch.nan if x.is_floating_point() else 0)
