# SPDX-License-Identifier: Apache-2.0
"""Every op of the registry, naive against fused, by pytest-benchmark: `make bench`, `klq bench`.

A side that fails the gate has no number. `extra_info` has the least traffic and work, the rate
that makes, the floor by this machine's ceilings (measured first), memory beyond the inputs, and
`x_naive`: how many times shorter the minimum is than the faster naive side's. "paged" is the same
where the allocator gives memory back between calls (`jobs.keep_memory`). On shared machines the
minimum of the rounds is what repeats.
"""

import pytest
import torch

from benchmarks import jobs, measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS, FEWEST, MOST = 1.2, 7, 1000  # of rounds a side

ALL = [(job, side) for job in jobs.jobs(DEVICE) for side in job.sides]
shortest: dict[tuple[str, str], float] = {}  # the faster naive side of a group


@pytest.fixture(scope="module", autouse=True)
def ceilings():
    torch.manual_seed(0)
    jobs.keep_memory(True)
    return jobs.ceilings(DEVICE)


@pytest.mark.parametrize(("job", "side"), ALL, ids=[jobs.label(j, s) for j, s in ALL])
def test_op(benchmark, ceilings, job, side):
    benchmark.group = f"{job.op}, {job.shape}"
    run = jobs.call(job, jobs.given(job).inputs, side, jobs.given(job).upstream)
    got = run()
    why = measure.wrong(jobs.checks(job, side, got))
    assert why is None, why
    del got
    least = jobs.cost(job)
    floor = jobs.floor(job, least, ceilings)
    extra = jobs.extra_bytes(DEVICE, run)
    about = {"op": job.op, "shape": job.shape, "side": side, "device": DEVICE, "floor": floor}
    about |= {"bytes": least.bytes, "flops": least.flops, "extra_bytes": extra}
    benchmark.extra_info.update(about)

    def timed():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    # a first call has been made: this one is about as long as the next
    rounds = min(MOST, max(FEWEST, int(SECONDS / jobs.best(run, 1, warm=0))))
    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable: the gate alone
        return
    least_time = benchmark.stats.stats.min
    times = {"x_naive": least_time}
    if DEVICE == "cpu":
        jobs.keep_memory(False)
        times["x_naive_paged"] = benchmark.extra_info["paged"] = jobs.best(run, 3, warm=1)
        jobs.keep_memory(True)
    for name, x in times.items():
        key = benchmark.group, name
        if side in ("eager", "reference"):
            shortest[key] = min(shortest.get(key, x), x)
        elif key in shortest:
            benchmark.extra_info[name] = shortest[key] / x
    unit, amount = ("TFLOP/s", least.flops / 1e12) if job.spec.kind == "linear" else (
        "GB/s", least.bytes / 1e9)  # fmt: skip
    benchmark.extra_info |= {unit: amount / least_time, "x_floor": least_time / floor}
