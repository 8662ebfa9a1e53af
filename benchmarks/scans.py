# SPDX-License-Identifier: Apache-2.0
"""The return scans as workloads: microseconds, so that launch, cache and graph count.

Each side is timed five ways (see `measure.Side`): a call from an idle device and a replay in a CUDA
graph, on inputs rotated past the L2 and on the same ones again; and the host's share of a call.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import klq_kernels as klq
from benchmarks.measure import Absent, Bar, Check, Group, Side
from benchmarks.peers import GAMMA, LAM, PEERS
from klq_kernels._dispatch import resolve

TAU = 0.05
ROTATED = 256 << 20  # bytes of inputs and outputs before the first set comes again: 4 x the L2
BYTES = {"lambda_returns": 25, "gae": 17}  # a token: float32 in and out, a mask of one byte
TAKES = {
    "lambda_returns": ("log_ratios", "values", "rewards", "mask"),
    "gae": ("rewards", "values", "mask"),
}
GIVES = {"lambda_returns": ("q", "advantages", "returns"), "gae": ("advantages", "returns")}
# microseconds of a call and of a replay, inputs cold; the large shape is held to its floor
BARS = {(64, 1024): (16, 3), (512, 2048): (18, 8), (8, 131072): (24, 14)}


BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpp",)}


def require(op: str, device: str, backend: str) -> None:
    """Absent, with the library's own reason, where `backend` has no kernel for `op`."""
    try:
        resolve(op, torch.device(device), torch.float32, backend)
    except RuntimeError as error:
        raise Absent(str(error)) from error


def scalars(op: str) -> dict:
    return {"gamma": GAMMA, "lam": LAM} | ({"tau": TAU} if op == "lambda_returns" else {})


def scan_checks(op: str, inputs: dict[str, Tensor], got) -> dict[str, Check]:
    """Against the C++ kernel in float64, on at most 64 rows, within a multiple of float32's
    round-off over a horizon of 1 / (1 - gamma lam)."""
    b, t = inputs["values"].shape[0], inputs["values"].shape[-1]
    rows = slice(None)
    if inputs["values"].dim() == 2 and b > 64:
        rows = torch.randint(b, (64,), device=inputs["values"].device)
        rows[0], rows[1] = 0, b - 1
    small = {k: x if k == "cu_seqlens" else x[rows] for k, x in inputs.items()}
    exact = {k: (x.double() if x.is_floating_point() else x).cpu() for k, x in small.items()}
    truth = getattr(klq, op)(**exact, **scalars(op), backend="cpp")
    largest = sum(float(x.abs().max()) for x in exact.values() if x.is_floating_point())
    bound = 2.0**-23 * (math.log2(max(2, t)) + 16) * largest / (1 - GAMMA * LAM)
    gives = zip(GIVES[op], got, truth, strict=False)  # a peer may give advantages alone
    return {name: Check(g[rows].cpu(), exact, bound) for name, g, exact in gives}


def batch(op: str, device: str, *shape: int) -> dict[str, Tensor]:
    numbers = torch.randn(3, *shape, device=device)
    made = dict(zip(("log_ratios", "values", "rewards"), numbers, strict=True))
    made["mask"] = torch.rand(shape, device=device) < 0.9
    return {k: made[k] for k in TAKES[op]}


def scan(op: str, rows: int, time: int, *, device="cuda", compiles=True) -> Group:
    floor = BYTES[op] * rows * time
    sets = [batch(op, device, rows, time) for _ in range(rotation(floor, device))]
    return _group(op, f"{rows}×{time}", sets, floor, (rows, time), device)


def packed_scan(op: str, long: int, ones: int, *, device="cuda", compiles=True) -> Group:
    """One long sequence and many of one token, back to back."""
    ends = torch.arange(ones + 1, device=device) + long
    ends = torch.cat([ends.new_zeros(1), ends]).int()
    floor = BYTES[op] * (long + ones) + 4 * len(ends)
    sets = [
        batch(op, device, long + ones) | {"cu_seqlens": ends}
        for _ in range(rotation(floor, device))
    ]
    return _group(op, f"packed {long}+{ones}×1", sets, floor, None, device)


def rotation(floor: int, device: str) -> int:
    return min(200, max(2, -(-ROTATED // floor))) if device == "cuda" else 1


def _group(op, shape, sets, floor, key, device) -> Group:
    absolute = BARS.get(key)
    bars = {"call": (), "graph": ()}
    if absolute:
        bars = {k: (Bar(x, "us"),) for k, x in zip(bars, absolute, strict=True)}
    elif key:
        bars = {"call": (), "graph": (Bar(1.12, "floor"),)}
    sides = []
    for backend in BACKENDS[device]:

        def load(backend=backend):
            require(op, device, backend)
            function, how = getattr(klq, op), scalars(op)
            return lambda inputs: function(**inputs, **how, backend=backend)

        check = partial(scan_checks, op, sets[0])
        own = {"graph": (Bar(1.7, "cuda"),)} if backend == "triton" else bars
        sides += _ways(backend, load, check, sets, floor, own, device)
    sides += _ways("torch.add", _load_add, partial(_check_add, sets[0]), sets, floor, {}, device)
    for peer in PEERS.get(op, ()):
        packed = "cu_seqlens" in sets[0]
        if packed or (peer.longest and sets[0]["values"].shape[-1] > peer.longest):
            continue
        truth = {k: x for k, x in sets[0].items() if peer.masked or k != "mask"}

        def load(peer=peer):
            run, last = peer.load(), (TAU,) if op == "lambda_returns" else ()
            return lambda inputs: run(*(inputs[k] for k in TAKES[op]), *last)

        ways = _ways(peer.name, load, partial(scan_checks, op, truth), sets, floor, {}, device)
        sides += (w for w in ways if peer.name != "eager loop" or w.kind == "call hot")
    return Group(op, shape, sides)


def _load_add() -> Callable:
    """One elementwise launch on the same tokens: what an eager call costs at the least."""
    return lambda inputs: torch.add(inputs["values"], inputs["rewards"])


def _check_add(inputs: dict, got: Tensor) -> dict[str, Check]:
    truth = inputs["values"].double() + inputs["rewards"].double()
    return {"sum": Check(got, truth, 1e-6 * truth.abs().max())}


def _ways(name, load, check, sets, floor, bars, device) -> Iterator[Side]:
    """The same calls, timed five ways."""
    few = 4 if floor > ROTATED else 20
    cold = list(itertools.islice(itertools.cycle(sets), max(few, len(sets))))

    def rotating():
        run, turn = load(), itertools.cycle(sets)
        return lambda: run(next(turn))

    def again():
        run = load()
        return lambda: run(sets[0])

    def many():
        run = load()

        def calls():
            for _ in range(5 * few):
                out = run(sets[0])
            return out

        return calls

    yield Side(name, rotating, check, floor, "call", bars=bars.get("call", ()))
    yield Side(name, again, check, floor, "call hot")
    if device == "cuda":
        graph, calls = partial(captured, load, cold, True), len(cold)
        yield Side(name, graph, check, floor, "graph", bars=bars.get("graph", ()), calls=calls)
        hot = [sets[0]] * few
        yield Side(name, partial(captured, load, hot, False), check, floor, "graph hot", calls=few)
    yield Side(name, many, check, floor, "host", calls=5 * few)


def captured(load: Callable, batches: list[dict], keep: bool) -> Callable:
    """A graph of one call a batch; `keep` gives each call its own output memory."""
    run = load()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(batches[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph, outs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for batch in batches:
            out = run(batch)
            if keep or not outs:
                outs.append(out)

    def replay():
        graph.replay()
        return outs[0]

    return replay
