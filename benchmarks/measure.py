# SPDX-License-Identifier: Apache-2.0
"""How a figure is made: check first, then time all sides of a group in turn, then divide.

A `Group` is one op on one shape; its `Side`s are everything that does that work, ours and others'.
Nothing that gives a wrong result gets a number, and what cannot run says why. A floor is bytes over
the copy rate of the same run, or what a side of the group took that does only what all must do.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

UNSTABLE = 0.05  # medians of two runs on a GPU


class Absent(Exception):
    """Why a side cannot run here: no such kernel, package not installed."""


class Check(NamedTuple):
    """What a side gave, what it should have given (float64), and how far apart they may be."""

    got: Tensor
    truth: Tensor
    bound: Tensor | float


class Bar(NamedTuple):
    """The time must be at most `limit` times `of`: "floor", "us", or another side of the group."""

    limit: float
    of: str


@dataclass
class Side:
    """One implementation. `setup` imports, compiles or captures, and returns the call to time.

    kind: "queued" (device time behind a flush of the L2), "call" (from an idle device, so with its
    launch), "graph" (a captured graph of `calls` calls), "host" (wall clock of a loop of calls that
    never waits); a kind that ends in " hot" runs on the same inputs again and again.
    """

    name: str
    setup: Callable[[], Callable]
    check: Callable[[object], dict[str, Check]]
    bytes: int  # least traffic of one call
    kind: str = "queued"
    prepare: Callable[[], object] | None = None  # untimed, before every call
    bars: tuple[Bar, ...] = ()
    calls: int = 1  # of the op in one run
    memory: int | None = None  # bytes that a call may need beyond its inputs, results included


@dataclass
class Group:
    op: str
    shape: str
    sides: list[Side]
    floor: str = ""  # the side whose time is the floor; none: bytes over the copy rate
    most: float = 1.0  # seconds of samples of a side


@dataclass
class Row:
    """One line of the results."""

    op: str
    shape: str
    side: str
    kind: str
    status: str = "ok"  # or "wrong", "absent", "failed", with a reason
    reason: str = ""
    bytes: int = 0
    extra_bytes: int | None = None  # peak memory of a call beyond what was allocated before it
    samples: list[float] = field(default_factory=list)  # seconds a call
    floor: float | None = None  # seconds
    bars: list[dict] = field(default_factory=list)
    spread: float | None = None  # between runs: longest median over the shortest, less 1

    @property
    def median(self) -> float:
        return quantile(self.samples, 0.5)

    def as_dict(self) -> dict:
        out = {k: v for k, v in vars(self).items() if v not in ("", None, [])}
        if self.samples:
            out["samples"] = [float(f"{x:.5g}") for x in self.samples]
            out["n"], out["min"] = len(self.samples), min(self.samples)
            out["median"] = self.median
            out["p20"], out["p80"] = (quantile(self.samples, q) for q in (0.2, 0.8))
            if self.floor:
                out["x_floor"] = self.median / self.floor
        return out


def quantile(samples: list[float], q: float) -> float:
    """Linear between order statistics, as numpy's default."""
    x = sorted(samples)
    at = q * (len(x) - 1)
    low = math.floor(at)
    return x[low] + (at - low) * (x[min(low + 1, len(x) - 1)] - x[low])


def wrong(checks: dict[str, Check]) -> str | None:
    """What is wrong with a result, None if nothing; NaN never passes, nor does an empty check."""
    if not checks:
        return "nothing was checked"
    for name, (got, truth, bound) in checks.items():
        if got.shape != truth.shape:
            return f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        if lost := int((~got.isfinite() & truth.isfinite()).sum()):
            return f"{name}: {lost} of the {got.numel()} checked are not finite"
        off = (got.double() - truth).abs()
        if not bool((off <= bound).all()):
            return f"{name}: {float((off - bound).max()):.3g} beyond its bound"
    return None


# --- timers: seconds of one run ----------------------------------------------------------------


class CudaTimer:
    """CUDA events on the current stream. The L2 is flushed by reading 2 GiB three times: clean
    lines, and 1.5 ms (H200) in which the host launches what follows. After one reading some calls
    took twice the device's time on an H100, because the host was late."""

    def __init__(self):
        self.flush = torch.ones(512 << 20, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def wait(self):
        torch.cuda.synchronize()

    def sample(self, kind: str, run: Callable) -> float:
        if kind == "host":
            run()
            torch.cuda.synchronize()
            before = time.perf_counter()
            run()
            spent = time.perf_counter() - before
            torch.cuda.synchronize()
            return spent
        if kind == "queued":
            for _ in range(3):
                self.flush.sum()
        elif kind.startswith("graph"):
            run()  # warms what is hot, and hides the launch of the next
        else:
            # the host's caches: a call after other work took three times as long
            for _ in range(5):
                run()
            torch.cuda.synchronize()
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3

    def extra_bytes(self, run: Callable) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


# --- groups ------------------------------------------------------------------------------------


def order(turn: int, count: int) -> list[int]:
    """The sides of a round, another order every time: at its power limit a card is faster after a
    side that leaves it cool, by 6 % in the same product (H200, 2026-11-26)."""
    return random.Random(turn).sample(range(count), count)


def measure(group: Group, timer, rounds: int, copy_rate: float) -> list[Row]:
    """Gate every side, then time those that passed, one call each in turn.

    A side stops after `group.most` seconds of samples, but not before its third.
    """
    rows, live = [], []
    for side in group.sides:
        row = Row(group.op, group.shape, side.name, side.kind, bytes=side.bytes)
        row.floor = side.bytes / copy_rate
        rows.append(row)
        with _Recorded(row):
            run = side.setup()
            _prepare(side)
            result = run()
            timer.wait()
            if (why := wrong(side.check(result))) is not None:
                row.status, row.reason = "wrong", why
                continue
            del result
            _prepare(side)
            row.extra_bytes = timer.extra_bytes(run)
            live.append((side, row, run))
    for turn in range(rounds):
        for side, row, run in (live[i] for i in order(turn, len(live))):
            if row.status != "ok" or (
                len(row.samples) >= 3 and sum(row.samples) * side.calls > group.most
            ):
                continue
            with _Recorded(row):
                _prepare(side)
                row.samples.append(timer.sample(side.kind, run) / side.calls)
    if group.floor:
        floor = next((r.median for r in rows if r.side == group.floor and r.samples), None)
        for row in rows:
            row.floor = floor
    judge(rows, [side.bars for side in group.sides])
    for row, side in zip(rows, group.sides, strict=True):
        if row.samples and side.memory is not None:
            need, limit = row.extra_bytes, side.memory
            row.bars.append({"limit": limit, "of": "bytes", "is": need, "met": need <= limit})
    return rows


def _prepare(side: Side):
    if side.prepare is not None:
        side.prepare()


class _Recorded:
    """An exception becomes the row's reason; nothing a side does ends the run."""

    def __init__(self, row: Row):
        self.row = row

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is None or not isinstance(error, Exception):
            return False
        lines = str(error).strip().split("\n")
        name = "" if isinstance(error, Absent) else f"{kind.__name__}: "
        self.row.status = "absent" if isinstance(error, Absent) else "failed"
        self.row.reason = (name + lines[0])[:200]
        self.row.samples = []
        return True


def judge(rows: list[Row], bars: list[tuple[Bar, ...]]) -> None:
    """Hold each row against its bars. Against a side that has no number nothing is judged, which is
    said unless the group has no such side."""
    medians = {(r.side, r.kind): r.median for r in rows if r.samples}
    without = {r.side: r.status for r in rows if not r.samples}
    for row, wanted in zip(rows, bars, strict=True):
        if not row.samples:
            continue
        for limit, of in wanted:
            unit = {"floor": row.floor, "us": 1e-6}.get(of, medians.get((of, row.kind)))
            if unit:
                x = row.median / unit
                row.bars.append({"limit": limit, "of": of, "is": x, "met": x <= limit})
            elif of in without:
                row.bars.append({"limit": limit, "of": of, "met": None, "why": without[of]})


# --- tables ------------------------------------------------------------------------------------


def _cells(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _verdict(row: Row) -> str:
    unit = {"us": "µs"}

    def said(b: dict) -> str:
        if b["met"] is None:
            return f"not judged: {b['of']} {b['why']}"
        verdict = "met" if b["met"] else "**missed**"
        if b["of"] == "bytes":
            return f"{verdict}: {b['is'] / 2**30:.2f} ≤ {b['limit'] / 2**30:.2f} GiB"
        return f"{verdict}: {b['is']:.3g} ≤ {b['limit']:.3g} " + unit.get(b["of"], f"× {b['of']}")

    moved = [f"**unstable**: ± {row.spread:.0%}"] if (row.spread or 0.0) > UNSTABLE else []
    return "; ".join(moved + [said(b) for b in row.bars])


def is_ours(side: str) -> bool:
    return bool({"cuda", "triton", "cpp"} & set(side.replace(",", "").split()))


def _word(row: Row) -> str:
    return {"wrong": "**wrong**"}.get(row.status, row.status)


def table(rows: list[Row], ours: tuple[str, ...] = ("cuda", "triton")) -> str:
    """Markdown: milliseconds of the queued rows, then microseconds of the scans, then reasons."""
    queued = [r for r in rows if r.kind == "queued"]
    out = []
    if queued:
        heads = ("op", "shape", "side", "ms", "× floor", "× ours", "extra GiB", "bars")
        out += [_cells(heads), _cells(["---"] * len(heads))]
        for r in queued:
            if not r.samples:
                out.append(_cells((r.op, r.shape, r.side, _word(r), "", "", "", "")))
                continue
            mine = [
                x.median
                for name in ours
                for x in queued
                if (x.op, x.shape, x.side) == (r.op, r.shape, name) and x.samples
            ]
            against = f"{r.median / mine[0]:.2f}" if mine else ""
            extra = "" if r.extra_bytes is None else f"{r.extra_bytes / 2**30:.2f}"
            ms, x = f"{r.median * 1e3:.3f}", f"{r.median / r.floor:.3f}" if r.floor else ""
            out.append(_cells((r.op, r.shape, r.side, ms, x, against, extra, _verdict(r))))
        out.append("")
    scans = [r for r in rows if r.kind != "queued"]
    if scans:
        kinds = ("call", "call hot", "graph", "graph hot", "host")
        heads = ("op", "shape", "side", "floor µs", *(f"{k} µs" for k in kinds), "bars")
        out += [_cells(heads), _cells(["---"] * len(heads))]
        for key in dict.fromkeys((r.op, r.shape, r.side) for r in scans):
            of = {r.kind: r for r in scans if (r.op, r.shape, r.side) == key}
            any_row = next(iter(of.values()))
            times = [
                (f"{of[k].median * 1e6:.2f}" if of[k].samples else _word(of[k])) if k in of else ""
                for k in kinds
            ]
            bars = "; ".join(f"{r.kind} {v}" for r in of.values() if (v := _verdict(r)))
            out.append(_cells((*key, f"{any_row.floor * 1e6:.2f}", *times, bars)))
        out.append("")
    reasons: dict[str, list[str]] = {}
    for r in rows:
        if r.reason:
            where = reasons.setdefault(f"{r.side} ({r.op}): {r.status}, {r.reason}", [])
            where += [r.shape] if r.shape not in where else []
    out += [f"- {why} [{', '.join(shapes)}]" for why, shapes in reasons.items()]
    return "\n".join(out).strip() + "\n"
