# SPDX-License-Identifier: Apache-2.0
"""The three LM-head ops against the same head followed by the op on logits: chunks, compaction,
frozen parts, dtypes."""

import pytest
import torch
from oracle import everywhere

from klq_kernels import (
    klq_loss,
    linear_klq_loss,
    linear_token_logprobs,
    linear_token_stats,
    token_logprobs,
    token_stats,
)
from klq_kernels._linear_head import ours

places = everywhere("linear_klq_loss", "linear_token_logprobs", "linear_token_stats")
TOKENS, WIDTH, VOCABULARY = 30, 16, 101


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(device, dtype)


def inputs(device, dtype=torch.float32, tokens=TOKENS):
    h = draw(tokens, WIDTH, device=device, dtype=dtype)
    w = (draw(VOCABULARY, WIDTH, seed=1, device=device) * WIDTH**-0.5).to(dtype)
    b = (draw(VOCABULARY, seed=2, device=device) * 0.1).to(dtype)
    a = torch.arange(tokens, device=device) % VOCABULARY
    mask = draw(tokens, seed=3, device=device) < 0.4
    v, ref, g = (draw(tokens, seed=s, device=device) for s in (4, 5, 6))
    return h, w, b, a, mask, v, {"ref_logprobs": ref - 3, "returns": g, "tau": 0.3}


def loss_and_gradients(h, w, b, a, v, *, fused=True, needs="hwbv", **how):
    given = {"h": h, "w": w, "b": b, "v": v}
    x = {k: t.clone().requires_grad_(k in needs) for k, t in given.items() if t is not None}
    if fused:
        out = linear_klq_loss(x["h"], x["w"], a, x["v"], bias=x.get("b"), **how)
    else:
        logits = torch.nn.functional.linear(x["h"], x["w"], x.get("b"))
        out = klq_loss(logits, a, x["v"], **how)
    leaves = [x[k] for k in x if k in needs]
    return out, dict(zip([k for k in x if k in needs],
                         torch.autograd.grad(out.loss, leaves), strict=True))  # fmt: skip


SCALINGS = [{}, {"temperature": 0.7, "logit_softcap": 3.0}]


@places
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_unfused_composition(device, backend, scaling, bias):
    h, w, b, a, mask, v, rest = inputs(device)
    b = b if bias else None
    how = {**rest, **scaling, "mask": mask, "backend": backend}
    out, grads = loss_and_gradients(h, w, b, a, v, **how)
    want, expected = loss_and_gradients(h, w, b, a, v, fused=False, **how)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=1e-6)
    for got, x in zip(out.stats, want.stats, strict=True):
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-4)
    for name, g in expected.items():
        torch.testing.assert_close(grads[name], g, rtol=1e-4, atol=1e-6, msg=name)
    more = {"mask": mask, **scaling, "backend": backend}
    logits = torch.nn.functional.linear(h, w, b)
    torch.testing.assert_close(
        linear_token_logprobs(h, w, a, bias=b, **more), token_logprobs(logits, a, **more),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    stats, want = linear_token_stats(h, w, a, bias=b, **more), token_stats(logits, a, **more)
    for got, x in zip(stats[:2], want[:2], strict=True):
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
    assert stats.ref_logprobs is None and stats.kl is None


@places
@pytest.mark.parametrize("rows", [1, 2, 7, 14, 15, 16, 29, 30, 31])
def test_case_65_chunk_edges(device, backend, rows):
    """N = R-1, R, R+1, 2R, 2R+1 tokens a chunk: the same to float32 accumulation."""
    h, w, b, a, mask, v, rest = inputs(device)
    how = {**rest, "mask": mask, "backend": backend}
    whole, expected = loss_and_gradients(h, w, b, a, v, **how)
    bytes_ = rows * VOCABULARY * 4
    out, grads = loss_and_gradients(h, w, b, a, v, chunk_bytes=bytes_, **how)
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-6, atol=1e-7)
    for name, g in expected.items():
        torch.testing.assert_close(grads[name], g, rtol=1e-5, atol=1e-6 * g.abs().max().item())
    more = {"mask": mask, "bias": b, "backend": backend}
    for op in (linear_token_logprobs, linear_token_stats):
        got, want = op(h, w, a, chunk_bytes=bytes_, **more), op(h, w, a, **more)
        first, second = (x if isinstance(x, torch.Tensor) else x.entropy for x in (got, want))
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@places
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["loss", "logprobs"])
def test_case_64_dw_does_not_lose_digits_over_chunks(device, backend, dtype, op):
    """16 chunks of 16-bit logits, the second half nearly cancelling the first: dW is summed in
    float32, so its error is that of one chunk, where rounding every chunk's dW costs 5 times it."""
    tokens, rows = 1024, 64
    h, w, _, a, _, v, rest = inputs(device, dtype, tokens)
    h = (1 + h.float() / 10).to(dtype)
    sign = torch.ones(tokens, device=device)
    sign[tokens // 2 :] = -1.0
    rest["returns"], v = -6 * sign + rest["ref_logprobs"] * 0, v * 0

    def dw(h, w, v, backend, **more):
        w = w.clone().requires_grad_()
        if op == "loss":
            rest_ = {
                k: x.to(v.dtype) if isinstance(x, torch.Tensor) else x for k, x in rest.items()
            }
            out = linear_klq_loss(h, w, a, v, **rest_, normalizer=1.0, backend=backend, **more).loss
            return torch.autograd.grad(out, w)[0]
        out = linear_token_logprobs(h, w, a, backend=backend, **more)
        return torch.autograd.grad(out, w, sign.to(out.dtype))[0]

    truth = dw(h.double(), w.double(), v.double(), "reference")
    one = dw(h, w, v, backend).double()
    many = dw(h, w, v, backend, chunk_bytes=rows * VOCABULARY * dtype.itemsize).double()
    scale = truth.abs().max()
    assert (many - truth).abs().max() <= (one - truth).abs().max() * 1.5 + 2**-22 * scale


@places
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_num_active_compacts_and_changes_nothing(device, backend, extra):
    """Exact and larger; the numbers of the uncompacted call, NaN in inactive rows included."""
    h, w, b, a, mask, v, rest = inputs(device)
    h[~mask] = torch.nan
    n = int(mask.sum()) + extra
    how = {**rest, "mask": mask, "backend": backend}
    out, grads = loss_and_gradients(h, w, b, a, v, num_active=n, **how)
    want, expected = loss_and_gradients(h, w, b, a, v, **how)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-6, atol=1e-6)
    for name, g in expected.items():
        torch.testing.assert_close(grads[name], g, rtol=1e-5, atol=1e-6)
        assert grads[name].isfinite().all()
    assert torch.count_nonzero(grads["h"][~mask]) == 0
    more = {"mask": mask, "bias": b, "backend": backend}
    for op in (linear_token_logprobs, linear_token_stats):
        got, want = op(h, w, a, num_active=n, **more), op(h, w, a, **more)
        got, want = (x if isinstance(x, torch.Tensor) else x.entropy for x in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@places
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_num_active_too_small_is_nan_never_partial(device, backend, masked, dtype, scaling):
    """Every result and every entry of every gradient, also those of tokens that are inactive or
    left out, of banned tokens, of weight 0 and of no upstream."""
    h, w, b, a, mask, v, rest = inputs(device, dtype)
    b[90:] = -torch.inf
    rest["weights"] = torch.arange(TOKENS, device=device) % 3.0
    mask = mask if masked else None
    count = int(mask.sum()) if masked else TOKENS
    for n in (count - 1, 1, 0):
        how = {"mask": mask, "num_active": n, "backend": backend, **scaling}
        stats = linear_token_stats(h, w, a, bias=b, **how)
        assert stats.logprobs.isnan().all() and stats.entropy.isnan().all()
        out, grads = loss_and_gradients(h, w, b, a, v, **rest, **how)
        assert out.loss.isnan() and all(x.isnan() for x in out.stats)
        assert all(g.isnan().all() for g in grads.values()), (n, grads)
        for more in ({}, {"keep_bytes": 2**30}, {"chunk_bytes": 3 * VOCABULARY * 4}):
            leaves = [x.clone().requires_grad_() for x in (h, w, b)]
            out = linear_token_logprobs(*leaves[:2], a, bias=leaves[2], **how, **more)
            grads = torch.autograd.grad(out, leaves, rest["weights"])
            assert out.isnan().all() and all(g.isnan().all() for g in grads), (n, more)


@places
def test_num_active_0_of_an_all_masked_batch(device, backend):
    h, w, b, a, mask, v, rest = inputs(device)
    how = {**rest, "mask": torch.zeros_like(mask), "num_active": 0, "backend": backend}
    out, grads = loss_and_gradients(h, w, b, a, v, **how)
    assert out.loss == 0
    assert all(torch.count_nonzero(g) == 0 for g in grads.values())


@places
@pytest.mark.parametrize("needs", ["h", "w", "b", "v", "hw", "hv"])
def test_case_62_frozen_parts(device, backend, needs):
    """A frozen weight (LoRA) leaves dH as it was, a frozen hidden state leaves dW."""
    h, w, b, a, mask, v, rest = inputs(device)
    how = {**rest, "mask": mask, "backend": backend}
    _, grads = loss_and_gradients(h, w, b, a, v, needs=needs, **how)
    _, expected = loss_and_gradients(h, w, b, a, v, **how)
    assert set(grads) == set(needs)
    for name, g in grads.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-6, atol=1e-7)
    if "v" in needs:
        return
    x = {k: t.clone().requires_grad_(k in needs) for k, t in (("h", h), ("w", w), ("b", b))}
    out = linear_token_logprobs(x["h"], x["w"], a, bias=x["b"], mask=mask, backend=backend)
    out.sum().backward()
    assert all((t.grad is not None) == (k in needs) for k, t in x.items())


@places
def test_case_63_tied_embeddings_add_their_gradients(device, backend):
    h, w, _, a, mask, v, rest = inputs(device)
    ids = torch.arange(TOKENS, device=device) % VOCABULARY
    how = {**rest, "mask": mask, "backend": backend}
    tied = w.clone().requires_grad_()
    linear_klq_loss(tied[ids] + h, tied, a, v, **how).loss.backward()
    separate = w.clone().requires_grad_()
    logits = (separate[ids] + h) @ separate.T
    klq_loss(logits, a, v, **how).loss.backward()
    torch.testing.assert_close(tied.grad, separate.grad, rtol=1e-4, atol=1e-6)


@places
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_dtype_float32_keeps_the_heads_digits(device, backend, dtype):
    """16-bit logits cost digits of the log-prob; float32 ones do not, nor those of our own product,
    which are never rounded."""
    h, w, b, a, mask, v, rest = inputs(device, dtype)
    h = h * 8
    truth = token_logprobs(h.double() @ w.double().T + b.double(), a)
    error = {}
    for kept in (None, torch.float32):
        out = linear_token_logprobs(h, w, a, bias=b, logits_dtype=kept, backend=backend)
        error[kept] = (out.double() - truth).abs().max()
        out, grads = loss_and_gradients(h, w, b, a, v, mask=mask, logits_dtype=kept,
                                        backend=backend, **rest)  # fmt: skip
        assert out.loss.dtype == torch.float32
        assert [g.dtype for g in grads.values()] == [dtype] * 3 + [torch.float32]
    assert error[torch.float32] <= 1e-5
    own = backend != "reference" and ours(backend, h, w)
    assert error[None] <= 1e-5 if own else error[None] > 1e-4


@places
def test_case_59_hidden_of_any_layout(device, backend):
    h, w, b, a, mask, v, rest = inputs(device)
    flat, expected = loss_and_gradients(h, w, b, a, v, mask=mask, backend=backend, **rest)
    shape = (5, 6)
    lead = {k: x.view(shape) if isinstance(x, torch.Tensor) else x for k, x in rest.items()}
    views = {
        "batch": h.view(*shape, WIDTH),
        "time first": h.view(*shape, WIDTH).transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.cat([h.view(*shape, WIDTH)] * 2, 1)[:, : shape[1]],
        "odd pitch": torch.cat([h.view(*shape, WIDTH)] * 2, -1)[..., :WIDTH],
        "width strided": torch.stack([h.view(*shape, WIDTH)] * 2, -1)[..., 0],
    }
    for name, view in views.items():
        x = view.detach().requires_grad_()
        out = linear_klq_loss(
            x,
            w,
            a.view(shape),
            v.view(shape),
            bias=b,
            mask=mask.view(shape),
            backend=backend,
            **lead,
        )
        (dh,) = torch.autograd.grad(out.loss, x)
        torch.testing.assert_close(out.loss, flat.loss, rtol=1e-6, atol=1e-6, msg=name)
        torch.testing.assert_close(dh.reshape(TOKENS, WIDTH), expected["h"], rtol=1e-5, atol=1e-6)


@places
@pytest.mark.parametrize(("width", "vocabulary"), [(33, 101), (64, 50), (34, 257)])
def test_nan_beside_a_row_stays_out_of_it(device, backend, width, vocabulary):
    """Rule 5: NaN between rows of hidden, or in the next active row. oneDNN's AMX product of
    bfloat16 reads whole tiles of 32 columns, past the end of a row: NaN x 0."""
    _, _, _, a, _, v, rest = inputs(device, tokens=64)
    a = a % vocabulary
    h = draw(64, width, device=device, dtype=torch.bfloat16)
    w = draw(vocabulary, width, seed=1, device=device, dtype=torch.bfloat16) / 8
    room = torch.full((64, 2 * width), torch.nan, dtype=h.dtype, device=device)
    room[:, :width] = h
    next_row = h.clone()
    next_row[5] = torch.nan
    sound = torch.arange(64, device=device) != 5
    for keep_bytes, logits_dtype in ((0, None), (2**30, None), (0, torch.float32)):
        made = []
        for x in (h, room[:, :width], next_row):
            x = x.detach().requires_grad_()
            how = {"backend": backend, "logits_dtype": logits_dtype}
            logprobs = linear_token_logprobs(x, w, a, keep_bytes=keep_bytes, **how)
            per_token = linear_klq_loss(x, w, a, v, **how, **rest)
            grads = torch.autograd.grad(logprobs.sum() + per_token.loss, x)[0]
            made.append((logprobs, grads))
        for want, got, beside in zip(*made, strict=True):
            assert want.isfinite().all() and torch.equal(got, want)
            if got is not made[1][1]:  # the loss is of all rows
                assert torch.equal(beside[sound], want[sound]) and beside[5].isnan().all()
        x = next_row.requires_grad_()
        (dh,) = torch.autograd.grad(
            linear_token_logprobs(x, w, a, keep_bytes=keep_bytes, **how).sum(), x
        )
        assert dh[sound].isfinite().all() and dh[5].isnan().all()


@places
def test_rule_13_float16_head_does_not_flush_to_zero(device, backend):
    """Batch-size normaliser, loss scale 65536, gradients of hidden and weight in float16."""
    h, w, b, a, _, v, rest = inputs(device, torch.float16)
    got = {}
    for name, cast in (("half", torch.float16), ("truth", torch.float64)):
        x = h.to(cast).requires_grad_()
        y = w.to(cast).requires_grad_()
        z = {k: t.to(torch.float64) if cast == torch.float64 and k != "tau" else t
             for k, t in rest.items()}  # fmt: skip
        used = backend if cast == torch.float16 else "reference"
        out = linear_klq_loss(
            x, y, a, v if cast == torch.float16 else v.double(), bias=b.to(cast),
            normalizer=2.0**20, backend=used, **z,
        ).loss  # fmt: skip
        got[name] = torch.autograd.grad(out * 65536.0, (x, y))
    for half, truth in zip(got["half"], got["truth"], strict=True):
        visible = truth.abs() > 2.0**-22
        assert ((half == 0) & visible).float().mean() < 1e-3
        limit = 2.0**-6 if backend == "reference" else 2.0**-10
        off = (half.double() - truth).abs()
        assert (off <= limit * truth.abs().max() + 2.0**-24).all()
