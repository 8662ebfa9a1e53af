# SPDX-License-Identifier: Apache-2.0
"""The op registry as benchmarks: op x forward or step x dtype x shape x backend, on CPU or GPU.

No op is named here. `klq_kernels._registry.SPECS` says what an op takes, which inputs get gradients
and what the least traffic and work are; `_dispatch.TABLE` says which backends it has. "forward" is
one call without gradients, "step" a call and its backward. `checks` is what a side has to pass
before it is timed: results and gradients against the float64 reference on the same inputs.
"""

import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.eager import EAGER
from benchmarks.measure import Check
from klq_kernels import _dispatch
from klq_kernels._registry import SPECS, Cost, OpSpec, tensors_of
from klq_kernels._samples import PER_SEQUENCE, PER_TOKEN, Case

KINDS = ("rows", "scan", "targets", "linear")
DROPPED = "bootstrap", "weights", "bias"
DENSE = Case("dense", KINDS, drop=("mask", *DROPPED))
SCAN = Case("scan", KINDS, drop=DROPPED)  # trainers' scans have masks

# leading dimensions, vocabulary, width of hidden states
SHAPES = {
    "cpu": {
        "rows": (((512,), 50304, 1), ((1024,), 8192, 1)),
        "scan": (((64, 1024), 1, 1), ((8, 8192), 1, 1)),
        "targets": (((8, 64), 50304, 1), ((16, 128), 8192, 1)),
        "linear": (((512,), 32000, 256),),
    },
    "cuda": {
        "rows": (((4096,), 50304, 1), ((2048,), 128256, 1)),
        "scan": (((64, 1024), 1, 1), ((512, 2048), 1, 1)),
        "targets": (((32, 128), 50304, 1),),
        "linear": (((4096,), 50304, 2048),),
    },
}


class Job(NamedTuple):
    """One op at one shape; its sides do the same work on the same tensors."""

    name: str
    way: str  # "forward" or "step"
    dtype: torch.dtype
    size: tuple[tuple[int, ...], int, int]
    device: str
    active: int = 100  # per cent of the tokens; fewer: with a mask

    @property
    def spec(self) -> OpSpec:
        return SPECS[self.name]

    @property
    def op(self) -> str:
        return f"{self.name}, {self.way}" if self.spec.grads else self.name

    @property
    def shape(self) -> str:
        leading, vocabulary, width = self.size
        sizes = {"scan": (), "linear": (width, vocabulary)}.get(self.spec.kind, (vocabulary,))
        name = str(self.dtype).removeprefix("torch.")
        share = f", {self.active} % active" if self.active < 100 else ""
        return "×".join(map(str, (*leading, *sizes))) + f" {name}{share}"

    @property
    def sides(self) -> list[str]:
        """The naive ones first, so that the others can be held to them."""
        ready = [b for b, ok in _dispatch.available_backends().items() if ok is True]
        kernels = _dispatch.TABLE[self.name]
        fused = [b for b in ready if self.device in kernels.get(b, ())]
        eager = self.name in EAGER and self.active == 100  # which knows no masks
        return [*(["eager"] if eager else []), "reference", *fused]

    @property
    def case(self) -> Case:
        if self.active == 100:
            return SCAN if self.spec.kind == "scan" else DENSE
        count = math.prod(self.size[0]) * self.active // 100

        def edit(made):
            order = torch.randperm(made["mask"].numel(), device=made["mask"].device)
            made["mask"] = (order < count).view(made["mask"].shape)

        return Case("active", KINDS, edit, scalars={"num_active": count}, drop=DROPPED)


def jobs(device: str) -> Iterator[Job]:
    for spec in SPECS.values():
        # a scan's inputs are float32 whatever the model is
        narrow = () if spec.kind == "scan" else (torch.bfloat16,)
        one_pass = "normalizer" in spec.scalars  # the loss's gradient is its forward
        ways = (() if one_pass else ("forward",)) + (("step",) if spec.grads else ())
        for size in SHAPES[device][spec.kind]:
            for dtype in (torch.float32, *narrow):
                for way in ways:
                    yield Job(spec.name, way, dtype, size, device)


def label(job: Job, side: str) -> str:
    """The id of its benchmark."""
    return f"{job.op}-{job.shape}-{side}".replace(", ", "-").replace(" ", "-").replace("×", "x")


class Given(NamedTuple):
    """The tensors of a job, what float64 makes of some of its rows, and what PyTorch in the job's
    own dtype makes of these alone and of them among all: a product of many rows adds up in another
    order than one of few, and errs more."""

    inputs: dict
    upstream: Tensor | None
    some: Tensor  # indices into the first dimension
    few: dict  # the inputs there
    leading: tuple[int, ...]  # the tokens' dimensions there
    truth: list[Tensor]
    plain: list[tuple[Tensor, ...]]

    def upstream_of(self, rows: Tensor) -> Tensor | None:
        x = self.upstream
        return x if x is None or x.dim() == 0 else x[rows]

    def per_row(self, x: Tensor) -> bool:
        """Of a result or gradient of the few: that it has the tokens' dimensions first."""
        return x.shape[: len(self.leading)] == self.leading


@functools.lru_cache(maxsize=1)  # the sides of a job come one after another
def given(job: Job) -> Given:
    leading, vocabulary, width = job.size
    size = {"leading": leading, "vocabulary": vocabulary, "width": width}
    inputs = job.spec.inputs(job.device, job.dtype, job.case, **size)
    ends = {"scan": leading[0], "targets": 1}.get(job.spec.kind, 32)
    rows = torch.arange(leading[0], device=job.device)
    some = torch.cat([rows[:ends], rows[ends:][-ends:]])
    few = {
        k: x[some] if isinstance(x, Tensor) and k in (*PER_TOKEN, *PER_SEQUENCE) else x
        for k, x in inputs.items()
    }
    exact = {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in few.items()
    }
    made = Given(inputs, None, some, few, (len(some), *leading[1:]), [], [])
    if job.way == "step":
        like = tensors_of(job.spec.function(**few, backend="reference"))[0].detach()
        full = torch.empty(leading, dtype=like.dtype, device=job.device).normal_()
        made = made._replace(upstream=full if like.dim() else torch.ones_like(like))
    part = made.upstream_of(some)
    truth, alone, every = (
        [x.detach() for x in call(job, args, "reference", up)()]
        for args, up in ((exact, part), (few, part), (inputs, made.upstream))
    )
    plain = [(a, e[some]) if made.per_row(a) else (a,) for a, e in zip(alone, every, strict=True)]
    return made._replace(truth=truth, plain=plain)


def call(job: Job, inputs: dict, side: str, upstream: Tensor | None) -> Callable:
    """One call as a function without arguments; gives all results, then gradients."""
    function = EAGER[job.name] if side == "eager" else job.spec.function
    how = {} if side == "eager" else {"backend": side}
    names = gradients(job, inputs)

    def forward():
        with torch.no_grad():
            return tensors_of(function(**inputs, **how))

    def step():
        leaves = {n: inputs[n].detach().requires_grad_() for n in names}
        results = tensors_of(function(**{**inputs, **leaves}, **how))
        out = results[0]
        return results + list(torch.autograd.grad(out, leaves.values(), upstream.to(out.dtype)))

    return step if job.way == "step" else forward


def checks(job: Job, side: str, got: list[Tensor]) -> dict[str, Check]:
    """Rows of a call's results, and all results of a call on those rows alone, with their truth.

    Allowed: twice the error of the plain reference, and 2^-18 of the largest; 2^-6 for eager code
    in 16 bits. Coarse; tests/kernels is exact.
    """
    made = given(job)
    slack = 2.0**-6 if side == "eager" and job.dtype != torch.float32 else 2.0**-18
    alone = call(job, made.few, side, made.upstream_of(made.some))()
    # eager code gives no statistics of its loss: results from the front, gradients from the back
    grads = len(gradients(job, made.inputs))
    index = [*range(len(got) - grads), *range(len(made.truth) - grads, len(made.truth))]
    found = {}
    for x, y, i in zip(got, alone, index, strict=True):
        t, p = made.truth[i], made.plain[i]
        off = max(float((x.double() - t).abs().max()) for x in p)
        largest = float(t.abs().max())
        bound = 2 * off + slack * max(1.0, largest)
        found[f"result {i} of some rows"] = Check(y.detach(), t, bound)
        if made.per_row(t):
            found[f"result {i}"] = Check(x.detach()[made.some], t, bound)
    return found


def gradients(job: Job, inputs: dict) -> list[str]:
    """The inputs whose gradients a call gives."""
    return [n for n in job.spec.grads if n in inputs] if job.way == "step" else []


def results(job: Job) -> list[Tensor]:
    """Shapes and dtypes of a call's results and gradients, without data."""
    made, count = given(job), job.size[0][0]
    return [
        x.new_empty((count, *x.shape[1:]) if made.per_row(x) else x.shape, device="meta")
        for x, *_ in made.plain
    ]


def cost(job: Job) -> Cost:
    """Least bytes and operations of one call; rows that are masked are not read."""
    inputs, made = given(job).inputs, results(job)
    c = job.spec.cost(inputs, made[: len(made) - len(gradients(job, inputs))])
    moved, work = c.bytes, c.flops
    if job.way == "step":
        moved, work = moved + c.backward_bytes, work + c.backward_flops
    idle = 1 - job.active / 100
    rows = [inputs[n] for n in ("logits", "ref_logits", "hidden") if n in inputs]
    moved -= int(idle * sum(x.numel() * x.element_size() for x in rows))
    return Cost(moved, int(work * (1 - idle)))


def group(job: Job, kind: str) -> measure.Group:
    """The sides of a job for `measure.measure`."""
    inputs, upstream = given(job)[:2]
    sides = [
        measure.Side(
            side,
            functools.partial(call, job, inputs, side, upstream),
            functools.partial(checks, job, side),
            cost(job).bytes,
            kind,
        )
        for side in job.sides
    ]
    return measure.Group(job.op, job.shape, sides)


# --- ceilings and memory -----------------------------------------------------------------------


def best(run: Callable, rounds: int = 7, warm: int = 2) -> float:
    """The shortest of some runs, in seconds, the device waited for."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(rounds + warm):
        wait()
        begun = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begun)
    return min(times[warm:])


@functools.cache
def ceilings(device: str) -> dict[str, float]:
    """Bytes a second of a copy (read + write) and of the better of two reductions; operations a
    second of a square product in each dtype."""
    words, side = (512 << 20, 8192) if device == "cuda" else (64 << 20, 1536)
    source = torch.empty(words, device=device).normal_()
    target, size = torch.empty_like(source), 4 * words
    top = {"copy": 2 * size / best(functools.partial(target.copy_, source))}
    top["read"] = size / min(best(source.sum), best(source.amax))
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.empty(2, side, side, dtype=dtype, device=device).normal_()
        rate = 2 * side**3 / best(functools.partial(torch.mm, a, b))
        top[f"matmul {str(dtype).removeprefix('torch.')}"] = rate
    return top


def floor(job: Job, least: Cost, top: dict[str, float]) -> float:
    """Seconds: traffic over the copy rate; where there are products, their work over the rate of a
    product in the same dtype if that is longer."""
    moved = least.bytes / top["copy"]
    if job.spec.kind != "linear":
        return moved
    return max(moved, least.flops / top[f"matmul {str(job.dtype).removeprefix('torch.')}"])


def keep_memory(keep: bool) -> None:
    """On a CPU, under glibc: freed memory stays with the process, or goes back (the default).

    The default unmaps every block of 32 MiB and more, and pages it in again at the next call: on
    two cores of an EPYC eager log-probs of 512 x 50304 took 35 ms in place of 11, and swung by half
    from run to run (2026-11-25). Times are taken with memory kept, the best case of naive code;
    memory is counted with what goes back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0 if keep else 65536)  # M_MMAP_MAX: blocks with a mapping of their own
        mallopt(-1, 2**31 - 1 if keep else 128 * 1024)  # M_TRIM_THRESHOLD


def paged(run: Callable) -> float:
    """The shortest of three calls whose memory is paged in anew, as large blocks are by default."""
    return min(best(run, 1, warm=0) for _ in range(3) if give_back())


def give_back() -> bool:
    """Returns freed memory to the system; on a system without glibc nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is None or trim(0) >= 0


def extra_bytes(device: str, run: Callable) -> int | None:
    """Peak memory of one call beyond what was there before it, results included. On the CPU from
    the resident set, which only Linux lets one reset."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        keep_memory(False)
        give_back()  # or a call is given memory that is resident already
        Path("/proc/self/clear_refs").write_text("5")  # the high water mark falls to what is there
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None
    finally:
        keep_memory(True)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))
