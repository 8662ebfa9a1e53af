# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can get wrong, for every op and GPU backend: order of blocks, streams, graphs,
hidden synchronisation, other devices, and errors met around the Python checks."""

from pathlib import Path

import pytest
import torch
from gpu_calls import (
    BF16,
    CALLS,
    DEVICE,
    F32,
    FEW,
    Call,
    Hog,
    as_in_production,
    blank,
    capture,
    differs,
    each_backend,
    fill,
    no_waiting,
    wipe,
)
from oracle import Run, run, same_bits
from test_process import python
from torch import Tensor

from klq_kernels import gae, lambda_returns
from klq_kernels._registry import SPECS

pytestmark = [pytest.mark.gpu, each_backend]
every_call = pytest.mark.parametrize("call", CALLS, ids=str)
few_calls = pytest.mark.parametrize("call", FEW, ids=str)
ELSEWHERE = "cpu"
AROUND = Path(__file__).parent / "around_the_checks.py"


def nothing() -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=DEVICE)


@every_call
def test_bits_under_load(backend, call):
    """6-cases 20, 21, 66: 20 runs, outputs and gradients, while another stream takes processors
    away."""
    inputs = call.inputs()
    upstream = call.upstream(inputs, backend)
    want = call(inputs, backend, upstream)
    hog, bad = Hog(), nothing()
    for i in range(20):
        hog(i)
        bad |= differs(call(inputs, backend, upstream), want)
    assert not bad
    torch.cuda.synchronize()


SOAK = [
    Call("klq_targets", BF16, "packed", leading=(300,), vocabulary=300, lengths=(1, 90, 0, 200)),
    Call("klq_targets", BF16, leading=(20, 30), vocabulary=9000),
    Call("klq_targets", BF16, leading=(90, 80), vocabulary=8200),
    Call("lambda_returns", F32, "packed", leading=(9000,), lengths=(1, 0, 5000, 3990)),
    Call("klq_loss", BF16, inplace=True, leading=(20, 20), vocabulary=9000),
]


@pytest.mark.parametrize("call", SOAK, ids=str)
def test_soak_under_load(backend, call):
    """6-case 20: thousands of launches of what counts arrivals or waits inside a block."""
    inputs = call.inputs()
    upstream = call.upstream(inputs, backend)
    want = call(inputs, backend, upstream)
    hog, bad = Hog(), nothing()
    for i in range(2000):
        if i % 20 == 0:
            hog(i)
        bad |= differs(call(inputs, backend, upstream), want)
    assert not bad
    torch.cuda.synchronize()


def replayed(call, backend, after_copy: bool, seeds=range(5)):
    """(buffers, replay, results, data, expected results) of a captured call."""
    data = [call.inputs(seed) for seed in seeds]
    upstream = call.upstream(data[0], backend)
    wanted = [call(x, backend, upstream) for x in data]
    assert len(data) == 1 or bool(differs(wanted[0], wanted[1]))
    buffers = blank(data[0])
    fill(buffers, data[0])

    def step() -> Run:
        if not after_copy:
            return call(buffers, backend, upstream)
        # the op's first kernel follows a memcpy node, which no launch may overlap
        fresh = {k: x.clone() if isinstance(x, Tensor) else x for k, x in buffers.items()}
        return call(fresh, backend, upstream)

    replay, out = capture(step)
    return buffers, replay, out, data, wanted


@few_calls
@pytest.mark.parametrize("after_copy", [False, True], ids=["", "after_copy"])
def test_graph_replays(backend, call, after_copy):
    """6-cases 18, 38, 69: 1000 replays on changing data, bit for bit the eager results, and no
    synchronisation from the capture to the last replay."""
    as_in_production()
    buffers, replay, out, data, wanted = replayed(call, backend, after_copy)
    bad = nothing()
    with no_waiting():
        for i in range(1000):
            k = i * 3 % len(data)
            fill(buffers, data[k])
            replay()
            bad |= differs(out, wanted[k])
    assert not bad


LANES, SPANS, BLOCK4, BLOCK8 = (8192, 32), (2, 131072), (512, 512), (128, 2048)
PLANS = [  # each after each other, and the first again
    *(LANES, SPANS, LANES, BLOCK4, LANES, BLOCK8),
    *(SPANS, BLOCK4, SPANS, BLOCK8, BLOCK4, BLOCK8, LANES),
]


def test_scans_that_feed_scans(backend):
    """A scan may begin before the one before it has ended, in every plan after every other: what
    it reads was complete all the same, in a graph and outside."""
    torch.manual_seed(0)
    start = torch.randn(2, 1 << 18, device=DEVICE)

    def chain(after=lambda: None) -> list[Tensor]:
        a, g, out = *start.clone(), []
        for shape in PLANS * 2:
            a, g = gae(a.view(shape), g.view(shape), gamma=0.4, lam=0.9, backend=backend)
            out += [a, g]
            after()
        return out

    want = chain(torch.cuda.synchronize)
    replay, out = capture(chain)
    bad = nothing()
    for i in range(50):
        if i % 2:
            replay()
        for x, y in zip(out if i % 2 else chain(), want, strict=True):
            bad |= (x != y).any()
    assert want[-1].isfinite().all() and want[-1].any() and not bad


@few_calls
def test_two_graphs_interleaved(backend, call):
    """6-case 18: two graphs of a call on two streams at once, eager calls in between."""
    as_in_production()
    both = [replayed(call, backend, False, seeds) for seeds in ((0, 1), (2, 3))]
    streams, bad = [torch.cuda.Stream() for _ in both], [nothing() for _ in range(3)]
    inputs, want = both[0][3][0], both[0][4][0]
    upstream = call.upstream(inputs, backend)
    torch.cuda.synchronize()
    for i in range(100):
        for j, (buffers, replay, out, data, wanted) in enumerate(both):
            with torch.cuda.stream(streams[j]):
                fill(buffers, data[i % 2])
                replay()
                bad[j] |= differs(out, wanted[i % 2])
        if i % 4 == 0:
            bad[2] |= differs(call(inputs, backend, upstream), want)
    torch.cuda.synchronize()
    assert not any(bad)


FIRST = """
import os, torch
from gpu_calls import BF16, Call, differs
from klq_kernels._registry import SPECS
torch.ones(2, device="cuda", requires_grad=True).sum().backward()  # PyTorch's own threads are up
for name, spec in SPECS.items():
    if spec.kind == "linear":
        continue  # cuBLAS makes its handle first
    call = Call(name, BF16, leading=(3, 5), vocabulary=9000)
    inputs = call.inputs()
    upstream = torch.ones(() if name == "klq_loss" else (3, 5), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(inputs, "cuda", upstream)
    graph.replay()
    assert not differs(out, call(inputs, "cuda", upstream)), name
os._exit(0)  # PyTorch's threads, whose end the interpreter may cut short (once in four runs of all)
"""


def test_the_first_call_ever_is_captured(backend):
    """6-case 18: nothing is left to set up that a capture forbids. (Triton compiles first.)"""
    if backend == "cuda":
        python(FIRST)


@every_call
def test_side_stream_with_a_slow_producer(backend, call):
    """6-cases 16, 66, 67: inputs that a slow kernel makes on the same side stream, forward and
    backward, 200 runs; on any other stream they are read before they are there."""
    inputs = call.inputs()
    upstream = call.upstream(inputs, backend)
    want, buffers, bad = call(inputs, backend, upstream), blank(inputs), nothing()
    fill(buffers, inputs)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(200):
            wipe(buffers)
            torch.cuda._sleep(400_000)  # cycles: more than the host takes for a run
            fill(buffers, inputs)
            bad |= differs(call(buffers, backend, upstream), want)
    stream.synchronize()
    assert not bad


@pytest.mark.parametrize("shape", [(300, 40), (64, 1000), (2, 20000), (9000,)], ids=str)
def test_scans_feed_one_another(backend, shape):
    """A scan may begin before the one in front of it ends, but waits for what that one writes: 200
    in a row, each on the returns of the one before, as if the host had waited between them."""
    as_in_production()
    rho, v, r = (torch.randn(shape, device=DEVICE) for _ in range(3))
    how = {"tau": 0.3, "gamma": 0.5, "lam": 0.5, "alpha": 0.3, "backend": backend}
    if len(shape) == 1:
        how["cu_seqlens"] = torch.tensor([0, 1, 1, 5000, 8999], device=DEVICE)
    ends = []
    for wait in (True, False, False):
        x = r
        for _ in range(200):
            x = lambda_returns(rho, v, x, **how).returns
            if wait:
                torch.cuda.synchronize()
        ends.append(x)
    assert ends[0].isfinite().all()
    assert same_bits(ends[0], ends[1]) and same_bits(ends[0], ends[2])


LINEAR = [op for op, spec in SPECS.items() if spec.kind == "linear"]
NEVER_WAITS = [
    *CALLS,
    *(Call(op, case="compacted") for op in LINEAR),
    # more tokens are active than are said to be
    *(Call(op, BF16, "compacted", leading=(9, 9)) for op in LINEAR),
    *(Call(op, BF16, "compacted", logits32=True, leading=(9, 9)) for op in LINEAR),
    *(Call(op, case="strided") for op in SPECS),
    *(Call(op, case="narrow_ids") for op, spec in SPECS.items() if "mask" in spec.takes),
]


@pytest.mark.parametrize("call", NEVER_WAITS, ids=str)
def test_nothing_waits_for_the_device(backend, call):
    """6-case 19: forward and backward under sync-debug mode "error"."""
    as_in_production()
    inputs = call.inputs()
    upstream = call.upstream(inputs, backend)
    with no_waiting():
        call(inputs, backend, upstream)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every_call
def test_device_that_is_not_current(backend, call):
    """6-cases 17, 67: tensors on device 1 while device 0 is current."""
    inputs = call.inputs(device="cuda:0")
    upstream = call.upstream(inputs, backend)
    want = call(inputs, backend, upstream)
    there = {k: x.to("cuda:1") if isinstance(x, Tensor) else x for k, x in inputs.items()}
    with torch.cuda.device(0):
        got = call(there, backend, upstream.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    for made in (got.outputs, got.grads):
        for name, x in made.items():
            assert x.device.index == 1, name
            made[name] = x.to("cuda:0")
    assert not differs(got, want)


@pytest.mark.parametrize("op", SPECS)
def test_inputs_on_different_devices_raise(backend, op):
    spec = SPECS[op]
    inputs = spec.inputs(DEVICE)
    run(spec, inputs, backend)
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            moved = {**inputs, name: x.to(ELSEWHERE)}
            with pytest.raises((ValueError, RuntimeError), match=op):
                spec.function(**moved, backend=backend)


def test_errors_around_the_checks_leave_the_process_usable(backend):
    """`around_the_checks.py`: operators called directly with wrong sizes, types, devices or layouts
    raise before any launch, and right calls give the same bits afterwards as before."""
    if backend == "cuda":
        assert int(python(AROUND.read_text())) > 100
