# SPDX-License-Identifier: Apache-2.0
"""The LM head on our own Hopper product: exponentials and sums in its epilogue, references that are
too far off, edges of its tiles, the gradients made from exponentials. The ops over it are in
test_own_product and, by graph, stream and load, in test_gpu."""

import pytest
import torch
from gpu_calls import DEVICE
from oracle import same_bits
from own_product import needs_hopper

from klq_kernels import _linear_head as head
from klq_kernels import linear_klq_loss, linear_token_logprobs, linear_token_stats

pytestmark = [pytest.mark.gpu, needs_hopper]
# tokens, width, vocabulary: one tile and less, edges of tiles, several a block, deeper than a ring
SHAPES = [(1, 8, 1), (3, 64, 7), (127, 72, 191), (129, 136, 193), (300, 512, 1000)]
MANY = [(1500, 1032, 9001), (257, 4096, 513)]  # too many tiles for a sanitizer
small = pytest.mark.small
shapes = pytest.mark.parametrize(
    "shape", [*(pytest.param(s, marks=small) for s in SHAPES), *MANY], ids=str
)


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
    pitch = head.pitch(len(w), True)
    whole = torch.full((len(h) + 1, pitch + 8), 777.0, dtype=h.dtype, device=DEVICE)
    e = whole[: len(h), : len(w)]
    lp, (factors, own, _), _ = torch.ops.klq.linear_rows_(h, w, b, a, mask, t, cap, False, e)
    known = (a >= 0) & (a < len(w)) & (True if mask is None else mask)
    at = e.gather(-1, torch.where(known, a, 0)[:, None])[:, 0]
    assert same_bits(own.to(e.dtype)[known], at[known]) and (
        mask is None or (own[~mask] == 0).all()
    )
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
    assert same_bits(some[0], got) and same_bits(some[1][0], factors)
    # and the gradient itself, from what either call left
    grad = torch.randn(len(h), device=DEVICE)
    by = torch.empty(len(h), head.pitch(len(w), True), dtype=h.dtype, device=DEVICE)[:, : len(w)]
    scale, how = grad * factors, (t, cap or 0.0)
    torch.ops.klq.linear_dlogits_(by, h, w, b, a, scale, *some[1][1:], *how)
    size, want = grad.abs()[:, None].double(), g * grad.double()[:, None]
    bounds = want.abs() * (2**-8 + 4 * bound) + size * largest * 2**-20 + 1e-30
    assert ((by.double() - want).abs() <= bounds).all()
    assert ((some[2].double() - entropy).abs() <= bound * (2 + entropy)).all()


@shapes
@pytest.mark.parametrize("scaling", [(1.0, None), (0.7, 5.0)], ids=str)
def test_exponentials_are_the_gradient(shape, scaling):
    n, d, v = shape
    h, w = draw(n, d), draw(v, d, scale=2 * d**-0.5)
    a = torch.randint(v, (n,), device=DEVICE)
    a[:: max(1, n // 3)] = v - 1
    b = draw(v, scale=0.3)
    compare(h, w, a, None if scaling[1] is None else b, *scaling)


@small
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


@small
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


@small
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
        for keep in (0, 100 * 1008 * 2, 1 << 30):
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


@small
def test_opcheck():
    h, w, a = draw(20, 64), draw(104, 64), torch.arange(20, device=DEVICE)
    e, x = draw(20, 104), torch.randn(20, device=DEVICE)
    ops, slots = torch.ops.klq, torch.empty(2, 104, dtype=torch.int32, device=DEVICE)
    calls = [
        (ops.linear_rows_.default, (h, w, None, a, None, 1.0, 0.0, True, None)),
        (ops.linear_rows_.default, (h, w, None, a, None, 1.0, 0.0, False, e)),
        (ops.linear_hidden_.default, (h.clone(), e, w, x)),
        (ops.compact_tokens.default, (a > 3, 17)),
        (ops.linear_dlogits_.default, (e, h, w, None, a, x, x, x, 1.0, 0.0)),
        (ops.linear_weight_.default, (torch.randn(104, 64, device=DEVICE), e, h, True, None, None)),
        (
            ops.linear_chosen_.default,
            (torch.randn(104, 64, device=DEVICE), slots, h, a, x, x, False, x[:1].expand(104) * 0),
        ),
        (ops.klq_loss_tokens.default, (x, x + 1, x, x, 0.3, a > 3, None, x.sum())),
    ]
    for op, args in calls:
        torch.library.opcheck(op, args)


def weight_gradient(e, h, out, add, *extra):
    """linear_weight_, which writes nothing beside its sum."""
    whole = out.new_full((len(out) + 1, out.shape[1]), 777.0)
    whole[:-1] = out
    torch.ops.klq.linear_weight_(whole[:-1], e, h, add, *(extra or (None, None)))
    assert (whole[-1] == 777).all()
    return whole[:-1]


@shapes
def test_weight_gradient(shape):
    """dlogits^T hidden of rows that are not as long as apart, in place of the sum and added to it,
    within float32's error of the products' size; the same bits again."""
    n, d, v = shape
    e, h = draw(n + 1, head.pitch(v, True) + 8)[:n, :v], draw(n + 1, d + 8)[:n, :d]
    made = e.double().T @ h.double()
    most = n**0.5 * 2**-14 + n * 2**-20  # the matrix units truncate their sums
    for out, add in (
        (torch.full((v, d), torch.nan, device=DEVICE), False),
        (draw(v, d).float(), True),
    ):
        got = weight_gradient(e, h, out, add)
        want = made + out.double() if add else made
        assert (got.double() - want).abs().max() <= most
        assert same_bits(weight_gradient(e, h, out, add), got)


@small
@pytest.mark.parametrize("tokens", [1, 7, 8193, 20000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spare", [-1, 0, 5])
def test_compact_tokens(tokens, share, spare):
    mask = torch.rand(tokens + 1, device=DEVICE)[1:] < share  # begins anywhere
    count = int(mask.sum())
    size = max(0, count + spare)
    index, source, use, bad = torch.ops.klq.compact_tokens(mask, size)
    want = torch.nonzero_static(mask, size=size, fill_value=tokens).squeeze(-1)
    assert torch.equal(index, want) and torch.equal(source, want.clamp(max=tokens - 1))
    assert torch.equal(use, want < tokens)
    assert bad.isnan() if size < count else bad == 0


@shapes
def test_hidden_gradient(shape):
    """scale (dlogits weight), rounded once, and nothing beside it."""
    n, d, v = shape
    e, w = draw(n + 1, head.pitch(v, True) + 8)[:n, :v], draw(v + 1, d + 8)[:v, :d]
    scale = torch.randn(n, device=DEVICE)
    made = (e.double() @ w.double()) * scale.double()[:, None]
    most = (v**0.5 * 2**-14 + v * 2**-20) * scale.abs()[:, None]
    outs = []
    for _ in range(2):
        whole = torch.full((n + 1, d + 8), 777.0, dtype=e.dtype, device=DEVICE)
        torch.ops.klq.linear_hidden_(whole[:n, :d], e, w, scale)
        assert (whole[n] == 777).all() and (whole[:, d:] == 777).all()
        outs.append(whole[:n, :d])
    assert ((outs[0].double() - made).abs() <= most + made.abs() * 2**-8).all()
    assert same_bits(*outs)


@shapes
def test_narrow_weight_gradient(shape):
    """In bfloat16, rounded once, with what is extra in some of its rows, or nothing."""
    n, d, v = shape
    e, h = draw(n, head.pitch(v, True))[:, :v], draw(n, d)
    made, most = e.double().T @ h.double(), n**0.5 * 2**-14 + n * 2**-20
    extra = torch.randn(-(-v // 3), d, device=DEVICE) * 10
    slots = torch.full((2, v), -1, dtype=torch.int32, device=DEVICE)
    slots[0, ::3] = torch.randperm(len(extra), device=DEVICE).int()
    out = torch.full((v, d), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    for more in ((), (slots, extra)):
        got = weight_gradient(e, h, out, False, *more)
        want = made.clone()
        if more:
            want[::3] += extra[slots[0, ::3].long()].double()
        assert ((got.double() - want).abs() <= most + want.abs() * 2**-8).all()
        assert same_bits(weight_gradient(e, h, out, False, *more), got)


@small
@pytest.mark.parametrize("kind", ["few", "one action", "all apart"])
@pytest.mark.parametrize("d", [520, 4104])
def test_chosen_columns(kind, d):
    n, v = 500, 1000
    h, out = draw(n, d), draw(v, d).float()
    a = {
        "few": torch.randint(7, (n,), device=DEVICE),
        "one action": torch.full((n,), v - 1, device=DEVICE),
        "all apart": torch.randperm(v, device=DEVICE)[:n],
    }[kind]
    scale, own = torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE)
    own[::3], h[::3] = 0.0, torch.nan  # inactive
    x = torch.where((own == 0)[:, None], 0.0, h.double())
    stored = own.bfloat16().double()[:, None] * (scale[:, None] * x.float()).bfloat16().double()
    missing = (scale * own).double()[:, None] * x - stored
    want, before = out.double().index_add_(0, a, missing), a[[1, 4]]
    a[1], a[4], own[[1, 4]], h[[1, 4]] = -5, 10**12, 0.0, torch.nan  # no action at all
    want.index_add_(0, before, -missing[[1, 4]])
    again, found = out.clone(), out.clone()
    slots = torch.empty(2, v, dtype=torch.int32, device=DEVICE)
    bias = torch.zeros(v, device=DEVICE)
    for to in (out, again):
        torch.ops.klq.linear_chosen_(to, slots, h, a, scale, own, False, bias)
    torch.ops.klq.linear_chosen_(None, slots, h, a, scale, own, False, bias)
    missing = 3 * (scale * (own - own.bfloat16().float())).double()
    missing[[1, 4]] = 0.0
    want_bias = torch.zeros(v, device=DEVICE).double()
    want_bias.index_add_(0, torch.where((a >= 0) & (a < v), a, 0), missing)
    assert (bias.double() - want_bias).abs().max() <= 1e-5
    # 500 terms, each a difference of products of a few units
    assert (out.double() - want).abs().max() <= 2**-20 * missing.abs().sum(0).max() + 1e-5
    assert same_bits(out, again)
    # the same apart: the first token's row of each action
    extra = torch.full((n, d), torch.nan, device=DEVICE)
    torch.ops.klq.linear_chosen_(extra, slots, h, a, scale, own, True, None)
    named = slots[0] >= 0
    ids = a[own != 0].unique()
    assert torch.equal(named.nonzero().squeeze(-1), ids)
    assert all(slots[0, i] == ((a == i) & (own != 0)).nonzero()[0] for i in ids[:20])
    found[named] += extra[slots[0, named].long()]
    torch.testing.assert_close(found, out, rtol=1e-6, atol=1e-5)


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
