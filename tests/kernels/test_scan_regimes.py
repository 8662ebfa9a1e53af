# SPDX-License-Identifier: Apache-2.0
"""The scan on both sides of every size at which a kernel changes its plan, within rule 7: lanes,
warps and blocks a row, flat spans, packed lengths, dtypes and alignments."""

import math

import pytest
import torch
from oracle import everywhere, same_bits

from klq_kernels import gae, lambda_returns

places = everywhere("lambda_returns", "gae")
HOW = {"tau": 0.3, "gamma": 0.99, "alpha": 0.6}
SHAPES = [
    *((3, t) for t in (1, 2, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257)),
    *((3, t) for t in (1023, 1024, 1025, 4096, 4097)),
    *((1, 131072), (1, 131071), (9, 20001), (257, 4099), (256, 4097)),
    *((65537, 1), (65537, 3), (4100, 129), (4096, 258), (2049, 511), (1025, 1030)),
]
LENGTHS = {
    "skewed": [131072] + [1] * 4096,
    "skewed_last": [1] * 1500 + [0, 0] + [20000],
    "span_edges": [1024, 1024, 2047, 1, 1, 1023, 0, 1025, 4096],
    "tiny": [i % 5 for i in range(3000)],
    "empty_runs": [0] * 50 + [700] + [0] * 40 + [400, 3] + [0] * 9,
    "long": [1_200_001, 7, 300_000],
}


def inputs(shape, device, sequences, seed=0):
    made = torch.Generator().manual_seed(seed)
    args = {k: torch.randn(shape, generator=made) for k in ("log_ratios", "values", "rewards")}
    args["mask"] = torch.rand(shape, generator=made) < 0.7
    args["bootstrap"] = torch.randn(sequences, generator=made)
    return {k: x.to(device) for k, x in args.items()}


def check(args, backend, **how):
    """Within rule 7 of the C++ scan in float64, whose own error is of another order."""
    out = lambda_returns(**args, **HOW, **how, backend=backend)
    cpu = {k: x.cpu() if isinstance(x, torch.Tensor) else x for k, x in {**args, **how}.items()}
    wide = {k: x.double() if getattr(x, "is_floating_point", bool)() else x for k, x in cpu.items()}
    truth = lambda_returns(**wide, **HOW, backend="cpp")
    rest = {k: x for k, x in wide.items() if k not in ("log_ratios", "values", "rewards")}
    boot = rest.pop("bootstrap", None)
    zero = torch.zeros_like(wide["values"])
    terms = wide["rewards"].abs() + wide["values"].abs() + truth.q.abs()
    weighted = lambda_returns(
        *(zero, zero, terms), **rest, tau=0.0, gamma=HOW["gamma"], backend="cpp",
        bootstrap=None if boot is None else boot.abs(),
    ).advantages  # fmt: skip
    limit = 2 * 2**-24 * (math.log2(max(2, zero.shape[-1])) + 16) * weighted
    for name, got, want in zip(out._fields, out, truth, strict=True):
        off = (got.cpu().double() - want).abs()
        assert (off <= limit).all(), f"{name}: {(off / limit).nan_to_num(0).max():.3f} of the bound"
    again = lambda_returns(**args, **HOW, **how, backend=backend)
    assert all(same_bits(a, b) for a, b in zip(out, again, strict=True))
    return out


def slow(backend, length):
    return backend == "reference" and length > 300  # the eager loop; the same code as short rows


@places
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_rows(device, backend, shape, masked):
    if slow(backend, shape[1]):
        return
    args = inputs(shape, device, shape[0])
    if not masked:
        del args["mask"]
    out = check(args, backend, lam=0.95)
    ours = gae(
        *(args["rewards"] - 0.3 * args["log_ratios"], args["values"]), gamma=0.99, lam=0.95,
        mask=args.get("mask"), bootstrap=args["bootstrap"], backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(ours.advantages, out.advantages, rtol=1e-4, atol=1e-4)


@places
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("wide", [False, True])
def test_packed(device, backend, lengths, wide):
    """With a tail that belongs to no sequence, int32 and int64 ends, lam a number or one a row."""
    lengths = LENGTHS[lengths]
    if slow(backend, sum(lengths)):
        return
    args = inputs((sum(lengths) + 3,), device, len(lengths))
    for x in ("log_ratios", "values", "rewards"):
        args[x][-3:] = torch.nan
    ends = torch.tensor([0, *lengths]).cumsum(0)
    args["cu_seqlens"] = ends.to(device, torch.int64 if wide else torch.int32)
    lam = args["bootstrap"].sigmoid() if wide else 0.95
    out = check(args, backend, lam=lam)
    assert all(torch.count_nonzero(x[-3:]) == 0 for x in out)


@places
@pytest.mark.parametrize("shape", [(3, 33), (5, 257), (3, 1025), (2, 9001)], ids=str)
def test_dtypes_alignments_traces(device, backend, shape):
    """Every kind of input at once: mixed dtypes, views off by one element, strides, a trace."""
    if slow(backend, shape[1]):
        return
    args = inputs(shape, device, shape[0])
    args["values"] = args["values"].bfloat16()
    args["rewards"] = args["rewards"].half()
    args["bootstrap"] = args["bootstrap"].bfloat16()
    check(args, backend, lam=args["values"][:, 0].sigmoid())
    for name in ("log_ratios", "values", "mask"):
        x = args[name]
        args[name] = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(shape)
    check(args, backend, trace=args["rewards"].sigmoid())
    args["rewards"] = torch.stack([args["rewards"]] * 2, -1)[..., 1]
    args["values"] = args["values"][:, :1].expand(shape)
    args["bootstrap"] = args["bootstrap"][:1].expand(shape[0])
    check(args, backend, lam=0.9)


@everywhere("lambda_returns")
@pytest.mark.parametrize("shape", [(3, 40), (3, 1500), (2, 9000)], ids=str)
def test_a_zero_factor_cuts(shape, device, backend):
    """NaN right of a token whose gamma c is 0 does not reach what is left of it on a GPU, whatever
    the plan."""
    if backend in ("reference", "cpp"):
        pytest.skip("a loop of 0 * NaN lets it through, and nothing else is promised")
    args = inputs(shape, device, shape[0])
    del args["mask"]
    how = {**HOW, "backend": backend}
    trace = torch.full(shape, 0.9, device=device)
    trace[:, 20] = 0.0
    clean = lambda_returns(**args, **how, trace=trace)
    args["rewards"][:, 21:] = torch.nan
    out = lambda_returns(**args, **how, trace=trace)
    for a, b in zip(clean, out, strict=True):
        assert same_bits(a[:, :20], b[:, :20])
    for zero in ({"gamma": 0.0}, {"lam": 0.0}):
        out = lambda_returns(**args, **{**how, **zero})
        assert out.advantages[:, :20].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rows", "long", "packed"])
def test_graphs_and_side_streams(kind):
    """A captured call replays on new numbers, on a stream of its own, bit for bit."""
    shape = {"rows": (64, 1024), "long": (2, 20000), "packed": (50000,)}[kind]
    count = shape[0] if kind != "packed" else 3
    args, fresh = (inputs(shape, "cuda", count, seed) for seed in (0, 1))
    how = {**HOW, "backend": "cuda"}
    if kind == "packed":
        how["cu_seqlens"] = torch.tensor([0, 7, 40000, 49999], device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        lambda_returns(**args, **how)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        out = lambda_returns(**args, **how)
    for name, x in fresh.items():
        args[name].copy_(x)
    graph.replay()
    want = lambda_returns(**fresh, **how)
    assert all(same_bits(a, b) for a, b in zip(out, want, strict=True))
