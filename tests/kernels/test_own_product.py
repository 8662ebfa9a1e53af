# SPDX-License-Identifier: Apache-2.0
"""The LM-head ops where the head's products are our own (bfloat16): on a Hopper GPU
and, with the stand-in for its operators, on the CPU. The operators themselves: test_gpu_linear."""

from contextlib import nullcontext

import pytest
import torch
from oracle import same_bits
from own_product import needs_hopper, stand_in

from klq_kernels import _linear_head as head
from klq_kernels import linear_klq_loss, linear_token_logprobs, linear_token_stats

N, D, V = 150, 64, 403
ROW = head.pitch(V, False) * 2  # bytes
PLACES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_hopper])]
SCALINGS = [{}, {"temperature": 0.7, "logit_softcap": 5.0}]


@pytest.fixture(params=PLACES)
def device(request):
    with stand_in() if request.param == "cpu" else nullcontext():
        yield request.param


def problem(device, dtype=torch.bfloat16):
    """hidden, weight, bias; the other arguments. What is inactive is garbage."""
    made = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=made)

    h, w, b = draw(N, D), 2 * draw(V, D) * D**-0.5, 0.3 * draw(V)
    a = torch.randint(V, (N,), generator=made)
    mask = torch.rand(N, generator=made) < 0.6
    v, ref, g, weights = draw(N), draw(N) - 5, draw(N), draw(N).abs()
    h[~mask], v[~mask], ref[~mask], a[~mask] = torch.nan, torch.inf, torch.nan, 10**9
    heads = [x.to(device, dtype) for x in (h, w, b)]
    rest = {"values": v, "ref_logprobs": ref, "returns": g, "weights": weights}
    rest = {k: x.to(device) for k, x in rest.items()}
    return heads, a.to(device), mask.to(device), rest


def run(op, heads, a, mask, rest, **how):
    """(results, gradients of hidden, weight, bias and of values where the op has them)."""
    leaves = [x.detach().clone().requires_grad_() for x in heads]
    h, w, b = leaves
    how = {"bias": b, "mask": mask, "logits_dtype": torch.float32, **how}
    if op == "loss":
        leaves.append(rest["values"].detach().clone().requires_grad_())
        made = linear_klq_loss(h, w, a, **{**rest, "values": leaves[-1]}, tau=0.3, **how)
        return [made.loss.detach(), *made.stats], torch.autograd.grad(made.loss * 3.0, leaves)
    if op == "kept":
        how["keep_bytes"] = 40 * ROW
    out = linear_token_logprobs(h, w, a, **how)
    return [out.detach()], torch.autograd.grad(out, leaves, rest["returns"].to(out.dtype))


def truth(op, heads, a, mask, rest, **how):
    rest = {k: x.double() for k, x in rest.items()}
    heads = [x.double() for x in heads]
    return run(op, heads, a, mask, rest, backend="reference", logits_dtype=None, **how)


def off(x, y):
    return float((x.double() - y).norm() / y.norm())


@pytest.mark.parametrize("scaling", SCALINGS, ids=["", "capped"])
@pytest.mark.parametrize("spare", [None, 0, 5])
@pytest.mark.parametrize("chunk", [None, 32 * ROW], ids=["whole", "chunks"])
@pytest.mark.parametrize("op", ["loss", "logprobs", "kept"])
def test_results_and_gradients_against_float64(device, op, chunk, spare, scaling):
    """Log-probs and the loss to float32's accuracy, gradients to bfloat16's; compacted, with spare
    slots, NaN and garbage wherever nothing is active."""
    heads, a, mask, rest = problem(device)
    assert head.ours("cpp", *heads[:2])
    outs, want = truth(op, heads, a, mask, rest, **scaling)
    how = {} if spare is None else {"num_active": int(mask.sum()) + spare}
    got, grads = run(op, heads, a, mask, rest, chunk_bytes=chunk, **scaling, **how)
    for x, y in zip(got, outs, strict=True):
        assert off(x, y) < 1e-4, (x, y)
    names = ("hidden", "weight", "bias", "values")
    for name, x, y in zip(names, grads, want, strict=False):
        assert x.isfinite().all(), name
        assert off(x, y) < (1e-4 if name == "values" else 2**-8), (name, off(x, y))
    assert torch.count_nonzero(grads[0][~mask]) == 0
    if op == "loss":
        assert torch.count_nonzero(grads[3][~mask]) == 0


@pytest.mark.parametrize("scaling", SCALINGS, ids=["", "capped"])
@pytest.mark.parametrize("spare", [None, 5])
def test_statistics_against_float64(device, spare, scaling):
    heads, a, mask, _ = problem(device)
    h, w, b = heads
    how = {"mask": mask, "backend": "reference", **scaling}
    want = linear_token_stats(h.double(), w.double(), a, bias=b.double(), **how)
    how = {"num_active": None if spare is None else int(mask.sum()) + spare, **scaling}
    got = linear_token_stats(h, w, a, bias=b, mask=mask, logits_dtype=torch.float32, **how)
    for x, y in zip(got[:2], want[:2], strict=True):
        assert off(x, y) < 1e-4 and (x[~mask] == 0).all()


@pytest.mark.parametrize("op", ["loss", "logprobs", "kept"])
def test_too_small_a_num_active_is_nan(device, op):
    heads, a, mask, rest = problem(device)
    for few in (0, 1, int(mask.sum()) - 1):
        outs, grads = run(op, heads, a, mask, rest, num_active=few, chunk_bytes=32 * ROW)
        assert all(x.isnan().all() for x in (*outs, *grads)), few


@pytest.mark.parametrize("op", ["loss", "logprobs", "kept"])
def test_under_autocast(device, op):
    """The bits of the call on heads cast by hand; gradients in the dtype that came."""
    heads, a, mask, rest = problem(device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        got, grads = run(op, heads, a, mask, rest)
    outs, want = run(op, [x.bfloat16() for x in heads], a, mask, rest)
    assert all(same_bits(x, y) for x, y in zip(got, outs, strict=True))
    for x, y in zip(grads, want, strict=True):
        assert x.dtype == torch.float32 and same_bits(x, y.float())


@pytest.mark.parametrize("op", ["loss", "logprobs", "kept"])
def test_compiled(device, op):
    heads, a, mask, rest = problem(device)
    how = {"num_active": int(mask.sum()) + 5, "chunk_bytes": 32 * ROW}
    torch._dynamo.reset()

    def step(leaves, v):
        h, w, b = leaves
        more = {"bias": b, "mask": mask, "logits_dtype": torch.float32, **how}
        if op == "loss":
            return linear_klq_loss(h, w, a, **{**rest, "values": v}, tau=0.3, **more).loss
        keep = 40 * ROW if op == "kept" else 0
        return (linear_token_logprobs(h, w, a, keep_bytes=keep, **more) * rest["returns"]).sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in heads]
        out = function(leaves, rest["values"])
        results.append([out.detach(), *torch.autograd.grad(out, leaves)])
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


def test_memory_that_begins_anywhere(device):
    """Rows that are not at multiples of 16 bytes of their memory take the library's product; hidden
    states are copied, as is a weight in memory that itself begins in between."""
    heads, a, mask, rest = problem(device)
    h, w, b = heads
    want = run("logprobs", heads, a, mask, rest)
    odd = torch.cat([h.new_zeros(3), h.flatten()])[3:].view(N, D)
    outs, grads = run("logprobs", [odd, w, b], a, mask, rest)
    for x, y in zip((*outs, *grads), (*want[0], *want[1]), strict=True):
        assert same_bits(x, y)
    there = torch.cat([w.new_zeros(3), w.flatten()])[3:].view(V, D)
    assert not head.ours("cpp", h, there)
    if device == "cpu":
        size = {"dtype": torch.bfloat16, "count": V * D}
        memory = bytearray(V * D * 2 + 2)
        both = [torch.frombuffer(memory, offset=i, **size).view(V, D) for i in (0, 2)]
        there = next(x for x in both if x.data_ptr() % 16).copy_(w)
        assert head.ours("cpp", h, there)
        outs, _ = run("logprobs", [h, there, b], a, mask, rest)
        assert same_bits(outs[0], want[0][0])
