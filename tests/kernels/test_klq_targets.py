# SPDX-License-Identifier: Apache-2.0
"""klq_targets is the composition of its parts, whichever reference it is given."""

import pytest
import torch
from oracle import everywhere, same_bits

from klq_kernels import klq_targets, lambda_returns, token_log_ratios, token_logprobs

places = everywhere("klq_targets", "lambda_returns", "token_logprobs")
HOW = {"tau": 0.3, "gamma": 0.97, "lam": 0.9, "alpha": 0.6}
SCALING = {"temperature": 0.7, "logit_softcap": 6.0}


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def inputs(device, *leading, vocabulary=37):
    z, b = (draw(*leading, vocabulary, seed=s, device=device) for s in (0, 1))
    v, r = (draw(*leading, seed=s, device=device) for s in (2, 3))
    a = torch.arange(z.shape[:-1].numel(), device=device).view(leading) % vocabulary
    return z, a, v, r, b


@places
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_parts(device, backend, packed):
    """Log-probs of both models, rho, then the scan; case 61: packed sequences do not bleed."""
    z, a, v, r, b = inputs(device, 18) if packed else inputs(device, 3, 6)
    mask = draw(*v.shape, seed=4, device=device) < 0.6
    cu = torch.tensor([0, 0, 6, 7, 16], device=device, dtype=torch.int32) if packed else None
    boot = draw(4 if packed else 3, seed=5, device=device)
    where = {"mask": mask, "cu_seqlens": cu, "bootstrap": boot}
    out = klq_targets(z, a, v, r, ref_logits=b, **where, **HOW, **SCALING, backend=backend)
    live = mask & (torch.arange(18, device=device) < 16) if packed else mask
    parts = {"mask": live, **SCALING, "backend": backend}
    assert same_bits(out.logprobs, token_logprobs(z, a, **parts))
    assert same_bits(out.ref_logprobs, token_logprobs(b, a, **parts))
    assert same_bits(out.log_ratios, token_log_ratios(z, b, a, **parts))
    scan = lambda_returns(out.log_ratios, v, r, **where, **HOW, backend=backend)
    for got, want in zip(out[3:], scan, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@places
def test_cached_reference_log_probs_give_the_same_targets(device, backend):
    z, a, v, r, b = inputs(device, 3, 6)
    mask = draw(3, 6, seed=4, device=device) < 0.6
    how = {"mask": mask, **HOW, **SCALING, "backend": backend}
    direct = klq_targets(z, a, v, r, ref_logits=b, **how)
    cached = token_logprobs(b, a, **SCALING, backend=backend)
    from_cache = klq_targets(z, a, v, r, ref_logprobs=cached, **how)
    for name, got, want in zip(direct._fields, from_cache, direct, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=name)


@places
def test_policy_equal_to_reference_leaves_plain_advantages(device, backend):
    """rho is exactly 0, so Q = V and the targets are TD(lambda) without KL."""
    z, a, v, r, _ = inputs(device, 3, 6)
    out = klq_targets(z, a, v, r, ref_logits=z.clone(), **HOW, backend=backend)
    assert torch.count_nonzero(out.log_ratios) == 0 and same_bits(out.q, v)


@places
def test_case_38_a_tail_of_masked_tokens_and_an_odd_vocabulary(device, backend):
    z, a, v, r, b = inputs(device, 2, 300, vocabulary=1021)
    mask = torch.zeros(2, 300, dtype=torch.bool, device=device)
    mask[0, :140] = True
    mask[1, 130:150] = True
    runs = [
        klq_targets(z, a, v, r, ref_logits=b, mask=mask, **HOW, backend=backend) for _ in range(3)
    ]
    for name, x in zip(runs[0]._fields, runs[0], strict=True):
        assert torch.count_nonzero(x[~mask]) == 0, name
        assert all(same_bits(x, getattr(other, name)) for other in runs[1:]), name


@places
def test_the_view_that_scores_a_response(device, backend):
    """logits[:, p-1:-1] of a prompt and response, uncopied (case 60: row t scores token t+1)."""
    z, _, _, _, b = inputs(device, 3, 9)
    ids = torch.arange(27, device=device).view(3, 9) % 37
    v, r = draw(3, 5, seed=2, device=device), draw(3, 5, seed=3, device=device)
    view = klq_targets(z[:, 3:-1], ids[:, 4:], v, r, ref_logits=b[:, 3:-1], **HOW, backend=backend)
    for t in range(5):
        want = z[:, 3 + t].double().log_softmax(-1).gather(-1, ids[:, 4 + t, None])[:, 0]
        torch.testing.assert_close(view.logprobs[:, t].double(), want, rtol=1e-5, atol=1e-5)
