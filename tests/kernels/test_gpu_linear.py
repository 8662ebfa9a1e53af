# SPDX-License-Identifier: Apache-2.0
"""The LM head on our own Hopper product: exponentials and sums in its epilogue, references that are
too far off, edges of its tiles, the gradients made from exponentials, graphs and waiting. The ops
over it, also where nothing but a CPU is: test_own_product."""

import os

import pytest
import torch
from gpu_calls import DEVICE, as_in_production, blank, capture, differs, fill, no_waiting
from oracle import Run, same_bits
from own_product import needs_hopper

from klq_kernels import _linear_head as head
from klq_kernels import linear_klq_loss, linear_token_logprobs, linear_token_stats

pytestmark = [pytest.mark.gpu, pytest.mark.small, needs_hopper]
# tokens, width, vocabulary: one tile and less, edges of tiles, several a block, deeper than a ring
SHAPES = [(1, 8, 1), (3, 64, 7), (127, 72, 191), (129, 136, 193), (300, 512, 1000)]
SHAPES += [(1500, 1032, 9001), (257, 4096, 513)]


def draw(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


def truth(h, w, a, b=None, t=1.0, cap=None):
    """log-probs, entropy and the gradient of the log-probs by the logits, in float64."""
    z = h.double() @ w.double().T
    z = (z if b is None else z + b.double()).requires_grad_()
    y = z if cap is None else cap * (z / cap).tanh()
    y = torch.where(z == -torch.inf, z, y) / t
    every = y.log_softmax(-1)
    lp = every.gather(-1, a[:, None])[:, 0]
    (g,) = torch.autograd.grad(lp.sum(), z)
    entropy = -torch.where(every == -torch.inf, 0.0, every.exp() * every).sum(-1)
    return lp.detach(), entropy.detach(), g


def exponentials(h, w, a, b=None, mask=None, t=1.0, cap=0.0):
    pitch = head.pitch(len(w))
    whole = torch.full((len(h) + 1, pitch + 8), 777.0, dtype=h.dtype, device=DEVICE)
    e = whole[: len(h), : len(w)]
    lp, factors, _ = torch.ops.klq.linear_rows_(h, w, b, a, mask, t, cap, False, e)
    assert (whole[-1] == 777).all() and (whole[:, pitch:] == 777).all()
    return lp, factors, e


def compare(h, w, a, b=None, t=1.0, cap=None, slack=1.0):
    lp, entropy, g = truth(h, w, a, b, t, cap)
    size = (h.double().abs() @ w.double().abs().T).max().item() / t
    bound = slack * (2e-5 + 2**-17 * size)  # the matrix units truncate their sums
    got, factors, e = exponentials(h, w, a, b, t=t, cap=cap or 0.0)
    assert (got <= 0).all()
    assert ((got.double() - lp).abs() <= bound).all()
    made = factors.double()[:, None] * e.double()
    largest = g.abs().amax(-1, keepdim=True)
    assert ((made - g).abs() <= g.abs() * (2**-8 + 4 * bound) + largest * 2**-20 + 1e-30).all()
    some = torch.ops.klq.linear_rows_(h, w, b, a, None, t, cap or 0.0, True, None)
    assert same_bits(some[0], got) and same_bits(some[1], factors)
    assert ((some[2].double() - entropy).abs() <= bound * (2 + entropy)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", [(1.0, None), (0.7, 5.0)], ids=str)
def test_exponentials_are_the_gradient(shape, scaling):
    n, d, v = shape
    h, w = draw(n, d), draw(v, d, scale=2 * d**-0.5)
    a = torch.randint(v, (n,), device=DEVICE)
    a[:: max(1, n // 3)] = v - 1
    b = draw(v, scale=0.3)
    compare(h, w, a, None if scaling[1] is None else b, *scaling)


@pytest.mark.parametrize("case", ["unlikely", "very negative", "far", "banned", "banned target"])
def test_references_that_are_too_far_off(case):
    """The chosen logit is hundreds below the row's largest, all are near -1000 or 20000, most or
    the chosen one are -inf: the second product, or none, gives the same results."""
    n, d, v = 200, 64, 1001
    h, w = draw(n, d), draw(v, d, scale=0.3)
    a = torch.randint(1, v - 1, (n,), device=DEVICE)
    b = torch.zeros(v, dtype=torch.bfloat16, device=DEVICE)
    if case == "unlikely":
        b[0] = 300.0
        a[::2] = 0
    elif case == "very negative":
        b -= 1000.0
    elif case == "far":
        b += 20000.0
    else:
        b[v // 3 :] = -torch.inf
        if case == "banned":
            a %= v // 3
    if case != "banned target":
        return compare(h, w, a, b, slack=10.0 if case == "far" else 1.0)
    lp, factors, e = exponentials(h, w, a, b)
    gone = a >= v // 3
    assert (lp[gone] == -torch.inf).all() and lp[~gone].isfinite().all()
    assert e.isfinite().all() and factors.isfinite().all() and (e[:, v // 3 :] == 0).all()


def test_nan_stays_in_its_row_and_masked_rows_are_zero():
    h, w = draw(300, 64), draw(1000, 64, scale=0.2)
    a = torch.randint(1000, (300,), device=DEVICE)
    mask = torch.arange(300, device=DEVICE) % 3 > 0
    clean = exponentials(h, w, a, mask=mask)
    bad = h.clone()
    bad[5] = torch.nan  # active
    a[0], a[3], a[7] = 10**9, -7, 1000  # two inactive ids, and an active one outside
    lp, factors, e = exponentials(bad, w, a, mask=mask)
    keep = mask.clone()
    keep[[5, 7]] = False
    assert lp[5].isnan() and lp[7].isnan()
    assert same_bits(lp[keep], clean[0][keep]) and same_bits(e[keep], clean[2][keep])
    assert (lp[~mask] == 0).all() and (factors[~mask] == 0).all() and (e[~mask] == 0).all()
    bad[~mask] = torch.nan
    some = torch.ops.klq.linear_rows_(bad, w, None, a, mask, 1.0, 0.0, True, None)
    assert some[0][7].isnan() and (some[0][~mask] == 0).all() and (some[2][~mask] == 0).all()


@pytest.mark.parametrize("needs", ["hwb", "h", "w"])
def test_gradients_from_exponentials(needs):
    """dH, dW and db of the loss and of log-probs within twice eager bfloat16's error (norm), over
    one chunk and many; the bias sums its factors in three pieces."""
    n, d, v = 300, 128, 1003
    h, w, b = draw(n, d), draw(v, d, scale=d**-0.5), draw(v, scale=0.2)
    a = torch.randint(v, (n,), device=DEVICE)
    up = torch.randn(n, device=DEVICE)
    mask = torch.rand(n, device=DEVICE) < 0.8
    up64 = torch.where(mask, up, 0.0).double()
    _, _, g = truth(h, w, a, b)
    g = g * up64[:, None]
    want = {"h": g @ w.double(), "w": g.T @ h.double(), "b": g.sum(0)}
    for chunk in (None, 50 * 1008 * 2):
        for keep in (0, 100 * 1008 * 4):
            x = {"h": h, "w": w, "b": b}
            x = {k: y.clone().requires_grad_(k in needs) for k, y in x.items()}
            out = linear_token_logprobs(
                x["h"],
                x["w"],
                a,
                bias=x["b"],
                mask=mask,
                logits_dtype=torch.float32,
                chunk_bytes=chunk,
                keep_bytes=keep,
            )
            leaves = [x[k] for k in needs]
            torch.autograd.grad(out, leaves, up, retain_graph=True)
            grads = torch.autograd.grad(out, leaves, up)
            for k, got in zip(needs, grads, strict=True):
                off = (got.double() - want[k]).norm() / want[k].norm()
                assert off < 2**-8, (k, chunk, keep, float(off))


def test_results_agree_between_ops():
    """Log-probs of the loss, the statistics and the log-probs come from the same float32 logits."""
    n, d, v = 500, 256, 3001
    h, w = draw(n, d), draw(v, d, scale=d**-0.5)
    a, x = torch.randint(v, (n,), device=DEVICE), torch.randn(n, device=DEVICE)
    how = {"logits_dtype": torch.float32}
    lp = linear_token_logprobs(h, w, a, **how)
    stats = linear_token_stats(h, w, a, **how)
    assert same_bits(lp, stats.logprobs)
    assert same_bits(lp, exponentials(h, w, a)[0])
    out = linear_klq_loss(h, w, a, x, ref_logprobs=lp, returns=x, tau=1.0, **how)
    assert out.loss == 0


def test_opcheck():
    h, w, a = draw(20, 64), draw(104, 64), torch.arange(20, device=DEVICE)
    e, x = draw(20, 104), torch.randn(20, device=DEVICE)
    ops = torch.ops.klq
    calls = [
        (ops.linear_rows_.default, (h, w, None, a, None, 1.0, 0.0, True, None)),
        (ops.linear_rows_.default, (h, w, None, a, None, 1.0, 0.0, False, e)),
        (ops.klq_loss_tokens.default, (x, x + 1, x, x, 0.3, a > 3, None, x.sum())),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args)


def test_many_launches_give_the_same_bits():
    h, w = draw(700, 256), draw(5000, 256, scale=0.1)
    a = torch.randint(5000, (700,), device=DEVICE)
    want = exponentials(h, w, a)
    bad = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(50):
        got = exponentials(h, w, a)
        for x, y in zip(got, want, strict=True):
            bad |= (x.float() != y.float()).any()
    assert not bad
    part = exponentials(h[3:50], w, a[3:50])  # rows do not know their neighbours
    assert same_bits(part[0], want[0][3:50]) and same_bits(part[2], want[2][3:50])


OPS = ["loss", "logprobs", "kept", "stats"]
every_op = pytest.mark.parametrize("op", OPS)
compacted = pytest.mark.parametrize("num_active", [None, 200], ids=["", "compacted"])


def batch(seed: int) -> dict:
    """At most 200 of 300 tokens are active, NaN where none is; two chunks and a kept one."""
    torch.manual_seed(seed)
    n, d, v = 300, 128, 1003
    mask = torch.arange(n, device=DEVICE) % 5 < 3
    h = draw(n, d)
    h[~mask] = torch.nan
    return {
        "hidden": h,
        "weight": draw(v, d, scale=d**-0.5),
        "bias": draw(v, scale=0.2),
        "actions": torch.randint(v, (n,), device=DEVICE),
        "mask": mask,
        "values": torch.randn(n, device=DEVICE),
        "ref_logprobs": torch.randn(n, device=DEVICE) - 7,
        "returns": torch.randn(n, device=DEVICE),
    }


def call(op: str, x: dict, num_active: int | None) -> Run:
    """Forward and backward on our own product."""
    names = ["hidden", "weight", "bias"]
    how = {"num_active": num_active, "chunk_bytes": 150 * 1008 * 2}
    x = {**x, **how, "logits_dtype": torch.float32}
    for name in names:
        x[name] = x[name].detach().requires_grad_()
    v, ref, g = (x.pop(k) for k in ("values", "ref_logprobs", "returns"))
    if op == "stats":
        return Run(dict(zip(("logprobs", "entropy"), linear_token_stats(**x), strict=False)), {})
    if op == "loss":
        made = linear_klq_loss(**x, values=v, ref_logprobs=ref, returns=g, tau=0.3)
        out, results, up = made.loss, [made.loss, *made.stats], made.loss.detach() * 0 + 0.5
    else:
        out = linear_token_logprobs(**x, keep_bytes=70 * 1008 * 2 if op == "kept" else 0)
        results, up = [out], g
    grads = torch.autograd.grad(out, [x[k] for k in names], up)
    results = {str(i): r.detach() for i, r in enumerate(results)}
    return Run(results, dict(zip(names, grads, strict=True)))


@every_op
@compacted
def test_nothing_waits_for_the_device(op, num_active):
    as_in_production()
    x = batch(0)
    want = call(op, x, num_active)
    with no_waiting():
        bad = differs(call(op, x, num_active), want)
        few = [] if op == "stats" else [call(op, x, 10)]  # fewer than there are
    assert not bad
    for made in few:
        assert all(r.isnan().all() for r in (*made.outputs.values(), *made.grads.values()))


@pytest.mark.skipif(
    "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ, reason="a capture may not call cudaMalloc"
)
@every_op
@compacted
def test_graph_replays(op, num_active):
    """Captured forward and backward on changing data, bit for bit the eager results."""
    as_in_production()
    data = [batch(seed) for seed in range(3)]
    wanted = [call(op, x, num_active) for x in data]
    assert differs(wanted[0], wanted[1])
    buffers = blank(data[0])
    fill(buffers, data[0])
    replay, out = capture(lambda: call(op, buffers, num_active))
    bad = torch.zeros((), dtype=torch.bool, device=DEVICE)
    with no_waiting():
        for i in range(30):
            fill(buffers, data[i % 3])
            replay()
            bad |= differs(out, wanted[i % 3])
    assert not bad
