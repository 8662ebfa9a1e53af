# SPDX-License-Identifier: Apache-2.0
"""Invariances of the row ops on drawn shapes and contents; those of the scan are beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import backends, same_bits

from klq_kernels import klq_loss, token_logprobs, token_stats

BACKENDS = backends("token_logprobs", "cpu")
runs = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
widths = st.sampled_from([1, 2, 3, 15, 16, 17, 63, 65, 1023, 1024, 1025, 2049])


def rows(seed, count, width, scale=2.0):
    made = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=made) * scale
    return z, torch.randint(width, (count,), generator=made)


@pytest.mark.parametrize("backend", BACKENDS)
@runs
@given(seed=seeds, width=widths, power=st.integers(-3, 8))
def test_a_shift_of_the_logits_cancels(backend, seed, width, power):
    """By a power of two on logits of few bits the shift is exact, so is the invariance."""
    z, a = rows(seed, 3, width)
    z = (z * 16).round() / 16
    shifted = z + 2.0**power * (2 if seed % 2 else -2)
    got = token_logprobs(shifted, a, backend=backend)
    torch.testing.assert_close(got, token_logprobs(z, a, backend=backend), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@runs
@given(seed=seeds, width=widths)
def test_the_order_of_rows_is_nothing(backend, seed, width):
    z, a = rows(seed, 6, width)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    straight = token_logprobs(z, a, backend=backend)
    assert same_bits(token_logprobs(z[order], a[order], backend=backend), straight[order])


@pytest.mark.parametrize("backend", BACKENDS)
@runs
@given(seed=seeds, width=widths)
def test_the_order_of_the_vocabulary_is_nothing_but_rounding(backend, seed, width):
    z, a = rows(seed, 3, width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    where = torch.empty_like(order).scatter_(0, order, torch.arange(width))
    one = token_stats(z, a, backend=backend)
    other = token_stats(z[:, order].contiguous(), where[a], backend=backend)
    for x, y in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@runs
@given(seed=seeds, width=widths, banned=st.integers(1, 2000))
def test_banned_tokens_are_as_if_absent(backend, seed, width, banned):
    """Padding a row with -inf on either side changes rounding at most (rule 8)."""
    z, a = rows(seed, 3, width)
    pad = torch.full((3, banned), -torch.inf)
    want = token_logprobs(z, a, backend=backend)
    for wide, ids in ((torch.cat([z, pad], 1), a), (torch.cat([pad, z], 1), a + banned)):
        leaf = wide.requires_grad_()
        got = token_logprobs(leaf, ids, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(got.sum(), leaf)
        assert grad.isfinite().all() and torch.count_nonzero(grad[wide == -torch.inf]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@runs
@given(seed=seeds, width=widths, tail=st.integers(0, 5))
def test_a_masked_tail_never_matters(backend, seed, width, tail):
    z, a = rows(seed, 4, width)
    made = torch.Generator().manual_seed(seed)
    v, ref, g = (torch.randn(4, generator=made) for _ in range(3))
    want = klq_loss(z, a, v, ref_logprobs=ref, returns=g, tau=0.3, backend=backend)

    def longer(x, fill):
        return torch.cat([x, torch.full((tail, *x.shape[1:]), fill).to(x.dtype)])

    got = klq_loss(
        *(longer(z, torch.nan), longer(a, -100), longer(v, torch.inf)),
        ref_logprobs=longer(ref, torch.nan),
        returns=longer(g, torch.nan),
        tau=0.3,
        mask=torch.arange(4 + tail) < 4,
        backend=backend,
    )
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=1e-7)
    for x, y in zip(got.stats, want.stats, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
