# SPDX-License-Identifier: Apache-2.0
"""Sides of a group: one for each of our backends, one for each peer."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks.measure import Bar, Side
from benchmarks.peers import PEERS
from benchmarks.scans import BACKENDS, require


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def ours(op: str, device: str, call: Callable, check: Callable, floor: int, **how) -> list[Side]:
    """A side for each of our backends, or the first of them with `twins=False`; `call(backend=...)`
    is one call. `name` and the other side of a bar may hold a {} for the backend; the bars that do
    not are CUDA's, and a Triton twin is held to CUDA and to torch.compile."""
    name, bars = how.pop("name", "{}"), how.pop("bars", ())
    backends = BACKENDS[device] if how.pop("twins", True) else BACKENDS[device][:1]
    twin = (1.7, name.format("cuda")), (1.0, "torch.compile")

    def bars_of(backend):
        own = [b for b in bars if "{}" in b[1]] + list(twin) if backend == "triton" else bars
        return tuple(Bar(limit, of.format(backend)) for limit, of in own)

    def setup(backend):
        require(op, device, backend)
        return partial(call, backend=backend)

    return [
        Side(
            name.format(b),
            partial(setup, b),
            check,
            floor,
            bars=bars_of(b),
            **how,
        )
        for b in backends
    ]


def theirs(op: str, args: tuple, check: Callable, floor: int, compiles: bool, **how) -> list[Side]:
    """The peers' sides; `check(peer, result)`."""

    def setup(peer):
        run = peer.load()
        return lambda: run(*args)

    return [
        Side(p.name, partial(setup, p), partial(check, p), floor, **how)
        for p in PEERS.get(op, ())
        if compiles or not p.compiles
    ]
