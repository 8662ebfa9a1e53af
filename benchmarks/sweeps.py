# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow: `klq bench --sweep`, one op along one axis at a time.

The axes are tokens N, vocabulary V, width D, steps T and the share of active tokens; all else
stays. Sides are those of the registry (`jobs`), gated and timed as everything else, cold on a GPU.
There the eager loop over T takes 75 to 150 µs a step, which is what bounds T.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks import jobs, measure
from benchmarks.jobs import Job


class Sweep(NamedTuple):
    op: str
    way: str
    axis: str
    label: str
    size: Callable[[int], tuple]  # leading dimensions, vocabulary, width at one point
    points: tuple[int, ...]


def powers(low: int, high: int, step: int = 1) -> tuple[int, ...]:
    return tuple(2**i for i in range(low, high + 1, step))


SHARES = 5, 12, 25, 50, 75, 100


def sweeps(device: str) -> tuple[Sweep, ...]:
    gpu = device == "cuda"
    v, n, d, area = (50304, 2048, 2048, 2**22) if gpu else (8192, 256, 256, 2**16)
    tokens, words = (powers(7, 13), powers(10, 18)) if gpu else (powers(4, 11), powers(8, 17))
    widths, times = (powers(9, 13), powers(6, 13)) if gpu else (powers(5, 10), powers(5, 13))
    shares = 4096 if gpu else 512

    def scan(t):
        return (area // t, t), 1, 1

    return (
        Sweep("token_logprobs", "forward", "N", "tokens N", lambda x: ((x,), v, 1), tokens),
        Sweep("klq_loss", "step", "N", "tokens N", lambda x: ((x,), v, 1), tokens),
        Sweep("token_logprobs", "forward", "V", "vocabulary V", lambda x: ((n,), x, 1), words),
        Sweep("klq_loss", "step", "V", "vocabulary V", lambda x: ((n,), x, 1), words),
        Sweep("linear_klq_loss", "step", "D", "width D", lambda x: ((n,), v, x), widths),
        Sweep("lambda_returns", "forward", "T", f"steps T, {area} tokens in all", scan, times),
        Sweep("klq_loss", "step", "active", "active, %", lambda _: ((shares,), v, 1), SHARES),
        Sweep("linear_klq_loss", "step", "active", "active, %", lambda _: ((n,), v, d), SHARES),
    )


class CpuTimer:
    """Wall clock; nothing is flushed, nothing runs beside it."""

    def wait(self):
        pass

    def sample(self, kind: str, run: Callable) -> float:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun

    def extra_bytes(self, run: Callable) -> int | None:
        return jobs.extra_bytes("cpu", run)


def point(sweep: Sweep, at: int, device: str, timer, top: dict[str, float], rounds: int) -> dict:
    """The rows of one size; a size that does not fit says so."""
    dtype = torch.float32 if device == "cpu" or sweep.axis == "T" else torch.bfloat16
    active = at if sweep.axis == "active" else 100
    job = Job(sweep.op, sweep.way, dtype, sweep.size(at), device, active)
    try:
        rows = measure.measure(
            jobs.group(job, "queued" if device == "cuda" else "call"), timer, rounds, top["copy"]
        )
        floor = jobs.floor(job, jobs.cost(job), top)
        needed = sum(x.numel() * x.element_size() for x in jobs.results(job))
    except torch.OutOfMemoryError as error:
        return {"at": at, "failed": str(error).split("\n")[0]}
    for row in rows:
        row.floor = floor
    found = [r.as_dict() for r in rows]
    return {"at": at, "shape": job.shape, "results_bytes": needed, "rows": found}


def run(
    device: str, top: dict[str, float], only: list[str], timer=None, rounds=9
) -> Iterator[dict]:
    """The sweeps of a device, each when it is done. `top` holds bytes a second ("copy") and
    operations a second of a product ("matmul float32", "matmul bfloat16")."""
    jobs.keep_memory(True)
    timer = timer or (measure.CudaTimer() if device == "cuda" else CpuTimer())
    for sweep in sweeps(device):
        if only and sweep.op not in only:
            continue
        begun, points = time.perf_counter(), []
        for at in sweep.points:
            points.append(point(sweep, at, device, timer, top, rounds))
            jobs.given.cache_clear()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        about = {"op": sweep.op, "axis": sweep.axis, "label": sweep.label}
        print(f"{sweep.op} over {sweep.axis}: {time.perf_counter() - begun:.1f} s", flush=True)
        yield {**about, "points": points}
