# SPDX-License-Identifier: Apache-2.0
"""klq_loss: in place, loss scales, normaliser and splitting, weights, extreme residuals."""

import pytest
import torch
from oracle import everywhere, same_bits

from klq_kernels import klq_loss

places = everywhere("klq_loss")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def inputs(device, *leading, vocabulary=53, dtype=torch.float32):
    z = draw(*leading, vocabulary, device=device).to(dtype)
    a = torch.arange(z.shape[:-1].numel(), device=device).view(leading) % vocabulary
    v, ref, g = (draw(*leading, seed=s, device=device) for s in (1, 2, 3))
    return z, a, v, {"ref_logprobs": ref - 3, "returns": g}


def gradients(z, a, v, upstream=1.0, **how):
    """(loss, dz, dv); in place through a non-leaf, as in training."""
    leaf, v = z.clone().requires_grad_(), v.clone().requires_grad_()
    used = leaf * 1.0 if how.get("inplace") else leaf
    out = klq_loss(used, a, v, **how)
    dz, dv = torch.autograd.grad(out.loss * upstream, (leaf, v))
    return out.loss.detach(), dz, dv


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [{}, {"temperature": 0.7, "logit_softcap": 4.0}])
def test_inplace_equals_out_of_place(device, backend, dtype, scaling):
    z, a, v, rest = inputs(device, 4, 6, dtype=dtype)
    mask = draw(4, 6, seed=5, device=device) < 0.5
    how = {**rest, "tau": 0.3, "mask": mask, **scaling, "backend": backend}
    for got, want in zip(
        gradients(z, a, v, inplace=True, **how), gradients(z, a, v, **how), strict=True
    ):
        if backend == "reference":
            torch.testing.assert_close(got, want)
        else:
            assert same_bits(got, want)


@places
def test_inplace_takes_no_new_logits(device, backend):
    """The gradient lies in the logits' storage."""
    z, a, v, rest = inputs(device, 4, 6)
    leaf = z.clone().requires_grad_()
    used = leaf * 1.0
    where = used.data_ptr()
    seen = []
    used.register_hook(lambda g: seen.append(g.data_ptr()))
    klq_loss(used, a, v, **rest, tau=0.3, inplace=True, backend=backend).loss.backward()
    assert seen == [where]


@places
def test_case_42_inplace_refuses_what_it_would_corrupt(device, backend):
    """A use saved before raises through the version counter; a leaf, expanded and overlapping
    logits are refused; a second backward raises (case 41)."""
    z, a, v, rest = inputs(device, 2, 3)
    how = {**rest, "tau": 0.3, "inplace": True, "backend": backend}
    leaf = z.clone().requires_grad_()
    used = leaf * 1.0
    other = used.square().sum()  # saves `used`
    loss = klq_loss(used, a, v, **how).loss
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        (loss + other).backward()
    with pytest.raises(ValueError, match=r"klq_loss.*leaf"):
        klq_loss(z.clone().requires_grad_(), a, v, **how)
    with pytest.raises(ValueError, match=r"klq_loss.*leaf"):
        klq_loss(z.clone().requires_grad_()[:, :], a, v, **how)
    with pytest.raises(ValueError, match="overlap"):
        klq_loss(z[:, :1].expand(2, 3, 53), a, v, **how)
    with pytest.raises(ValueError, match="overlap"):
        klq_loss(z.view(-1).as_strided((2, 3, 53), (60, 30, 1)), a, v, **how)
    used = z.clone().requires_grad_() * 1.0
    loss = klq_loss(used, a, v, **how).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"klq_loss.*second"):
        loss.backward()


@places
def test_case_43_float32_logits_are_not_touched_unless_asked(device, backend):
    z, a, v, rest = inputs(device, 2, 3)
    before = z.clone()
    gradients(z, a, v, **rest, tau=0.3, backend=backend)
    klq_loss(z, a, v, **rest, tau=0.3, backend=backend)
    assert same_bits(z, before)


@places
@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_on_views(device, backend, inplace):
    """logits[:, p-1:-1] of a larger tensor: only the view is consumed."""
    z, a, v, rest = inputs(device, 2, 3)
    base = draw(2, 7, 53, seed=9, device=device)
    base[:, 3:-1] = z
    leaf = base.clone().requires_grad_()
    whole = leaf * 1.0
    how = {**rest, "tau": 0.3, "backend": backend}
    loss = klq_loss(whole[:, 3:-1], a, v, inplace=inplace, **how).loss
    outside = torch.ones(7, dtype=torch.bool, device=device)
    outside[3:-1] = False
    assert same_bits(whole.detach()[:, outside], base[:, outside])
    loss.backward()
    _, dz, _ = gradients(z, a, v, **how)
    torch.testing.assert_close(leaf.grad[:, 3:-1], dz)
    assert torch.count_nonzero(leaf.grad[:, outside]) == 0


@places
@pytest.mark.parametrize("inplace", [False, True])
def test_rule_13_float16_does_not_flush_to_zero(device, backend, inplace):
    """A batch-size normaliser with loss scale 65536: as precise as the scaled loss would be, where
    a gradient stored in float16 before the scale is known is 99.97 % zeros."""
    z, a, v, rest = inputs(device, 8, 16, vocabulary=2048, dtype=torch.float16)
    how = {**rest, "tau": 0.05, "normalizer": 16384.0, "backend": backend}
    scale = 65536.0
    _, dz, _ = gradients(z, a, v, upstream=scale, inplace=inplace, **how)
    wide = {**how, "backend": "reference"}
    _, truth, _ = gradients(z.double(), a, v.double(), upstream=scale, **wide)
    visible = truth.abs() > 2.0**-24
    assert visible.float().mean() > 0.5
    lost = (dz == 0) & visible
    if backend == "reference" and not inplace:
        return  # autograd carries the loss scale there: nothing is stored before it
    assert lost.float().mean() < 1e-3, f"{lost.float().mean():.4f} of the entries flushed"
    off = (dz.double() - truth).abs()
    assert (off <= 2.0**-10 * truth.abs() + 2.0**-24).all()


@places
def test_case_40_upstream_of_a_loss_that_is_not_last(device, backend):
    z, a, v, rest = inputs(device, 3, 4)
    how = {**rest, "tau": 0.3, "backend": backend}
    _, base, dv = gradients(z, a, v, **how)
    for inplace in (False, True):
        leaf, w = z.clone().requires_grad_(), v.clone().requires_grad_()
        used = leaf * 1.0 if inplace else leaf
        total = klq_loss(used, a, w, inplace=inplace, **how).loss * 3.0 + w.sum() * 0.0
        (total.sin() * 0 + total).backward()
        torch.testing.assert_close(leaf.grad, 3 * base, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(w.grad, 3 * dv, rtol=1e-6, atol=1e-8)


@places
@pytest.mark.parametrize("as_tensor", [False, True])
def test_rule_11_splitting_reproduces_the_unsplit_gradient(device, backend, as_tensor):
    """Micro-batches of uneven active lengths, one of them empty, with the total as normaliser."""
    z, a, v, rest = inputs(device, 8, 6)
    mask = draw(8, 6, seed=5, device=device) < 0.3
    mask[4:6] = False
    weights = draw(8, 6, seed=6, device=device).abs()
    how = {"tau": 0.3, "backend": backend}
    whole = gradients(z, a, v, **rest, mask=mask, weights=weights, **how)
    n = mask.sum() if as_tensor else float(mask.sum())
    parts = []
    for s in (slice(0, 4), slice(4, 6), slice(6, 8)):
        part = {k: x[s] for k, x in rest.items()}
        more = {"mask": mask[s], "weights": weights[s], "normalizer": n}
        parts.append(gradients(z[s], a[s], v[s], **part, **more, **how))
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0], rtol=1e-6, atol=1e-7)
    for i in (1, 2):
        split = torch.cat([p[i] for p in parts])
        torch.testing.assert_close(split, whole[i], rtol=1e-6, atol=1e-8)


@places
def test_the_default_normaliser_counts_active_tokens(device, backend):
    z, a, v, rest = inputs(device, 4, 5)
    mask = torch.arange(20, device=device).view(4, 5) < 7
    how = {**rest, "tau": 0.3, "mask": mask, "backend": backend}
    seven = klq_loss(z, a, v, normalizer=7.0, **how)
    assert same_bits(klq_loss(z, a, v, **how).loss, seven.loss)
    assert int(seven.stats.count) == 7


@places
def test_stats_are_detached_sums_that_add(device, backend):
    """residual_sq without weights and normaliser; over micro-batches they add up."""
    z, a, v, rest = inputs(device, 6, 5)
    mask = draw(6, 5, seed=5, device=device) < 0.4
    weights = draw(6, 5, seed=6, device=device).abs()
    how = {"tau": 0.3, "backend": backend}
    stats = klq_loss(
        z.requires_grad_(), a, v, **rest, mask=mask, weights=weights, normalizer=3.0, **how
    ).stats
    assert all(not s.requires_grad and s.dim() == 0 and s.dtype == torch.float32 for s in stats)
    lp = z.detach().log_softmax(-1).gather(-1, a[..., None])[..., 0]
    q = 0.3 * (lp - rest["ref_logprobs"]) + v
    want = ((q - rest["returns"]).square()[mask].sum(), lp[mask].sum(), v[mask].sum(), mask.sum())
    for got, expected in zip(stats, want, strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    halves = [
        klq_loss(z[s], a[s], v[s], **{k: x[s] for k, x in rest.items()}, mask=mask[s], **how).stats
        for s in (slice(0, 2), slice(2, 6))
    ]
    for total, *parts in zip(stats, *halves, strict=True):
        torch.testing.assert_close(sum(parts), total, rtol=1e-5, atol=1e-5)


@places
def test_weights_multiply_the_squared_residual(device, backend):
    """Case 39: negative, zero, 1e-8 and 1e4; an inactive token's weight may be NaN."""
    z, a, v, rest = inputs(device, 1, 6)
    w = torch.tensor([[1.0, -2.0, 0.0, 1e-8, 1e4, torch.nan]], device=device)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]], device=device)
    how = {**rest, "tau": 0.3, "mask": mask, "normalizer": 1.0, "backend": backend}
    _, dz, dv = gradients(z, a, v, weights=w, **how)
    _, plain_z, plain_v = gradients(z, a, v, **how)
    scale = torch.where(mask == 1, w, 0.0)
    torch.testing.assert_close(dz, plain_z * scale[..., None], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(dv, plain_v * scale, rtol=1e-5, atol=1e-12)


@places
def test_case_74_extreme_residuals(device, backend):
    """Log-ratios of 50 and more, tau = 0 and 100: finite, no exponential of a ratio anywhere."""
    z, a, v, rest = inputs(device, 2, 4)
    rest["ref_logprobs"] = rest["ref_logprobs"] - 80.0
    for tau in (0.0, 1e-3, 100.0):
        loss, dz, dv = gradients(z, a, v, **rest, tau=tau, backend=backend)
        assert loss.isfinite() and dz.isfinite().all() and dv.isfinite().all()
        if tau == 0.0:
            assert torch.count_nonzero(dz) == 0 and torch.count_nonzero(dv) == dv.numel()


@places
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_rule_9_empty_batches(device, backend, shape):
    z, a, v, rest = inputs(device, *shape)
    for inplace in (False, True):
        loss, dz, dv = gradients(z, a, v, **rest, tau=0.3, inplace=inplace, backend=backend)
        assert loss == 0 and dz.shape == z.shape and dv.shape == v.shape


@places
def test_no_gradient_wanted(device, backend):
    """Evaluation: neither logits nor values need gradients, or only one of them does."""
    z, a, v, rest = inputs(device, 2, 3)
    how = {**rest, "tau": 0.3, "backend": backend}
    loss, dz, dv = gradients(z, a, v, **how)
    with torch.no_grad():
        out = klq_loss(z.clone().requires_grad_(), a, v, **how)
    assert same_bits(out.loss, loss) and not out.loss.requires_grad
    w = v.clone().requires_grad_()
    klq_loss(z, a, w, **how).loss.backward()
    torch.testing.assert_close(w.grad, dv)
    y = z.clone().requires_grad_()
    klq_loss(y, a, v, **how).loss.backward()
    torch.testing.assert_close(y.grad, dz)
