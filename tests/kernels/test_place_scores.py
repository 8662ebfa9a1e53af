# SPDX-License-Identifier: Apache-2.0
"""place_scores: the score of a sequence sits on its last active token, by the mask alone."""

import pytest
import torch
from oracle import everywhere

from klq_kernels import lambda_returns, place_scores

places = everywhere("place_scores")


@places
def test_case_1_the_score_lands_on_eos_not_on_the_first_pad(device, backend):
    """[t0, t1, EOS, pad, pad]; case 31: EOS and pad may be one id, ids are never consulted."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 0]], device=device)
    scores = torch.tensor([2.0, 3.0, 4.0], device=device)
    want = torch.tensor([[0, 0, 2.0, 0, 0], [0, 0, 0, 0, 3.0], [0, 0, 4.0, 0, 0]], device=device)
    assert torch.equal(place_scores(scores, mask, backend=backend), want)


@places
def test_a_row_without_active_tokens_drops_its_score(device, backend):
    mask = torch.tensor([[0, 0], [1, 0]], device=device)
    scores = torch.tensor([torch.nan, 1.0], device=device)
    want = torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=device)
    assert torch.equal(place_scores(scores, mask, backend=backend), want)


@places
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_with_empty_sequences_and_a_tail(device, backend, dtype):
    cu = torch.tensor([0, 0, 3, 3, 5, 5], device=device, dtype=dtype)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1], device=device)
    scores = torch.arange(1.0, 6.0, device=device)
    want = torch.tensor([0, 2.0, 0, 0, 4.0, 0, 0], device=device)
    assert torch.equal(place_scores(scores, mask, cu_seqlens=cu, backend=backend), want)


@places
def test_the_return_of_a_scored_sequence(device, backend):
    """gamma = lam = 1, no KL: every token's return is the score."""
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], device=device)
    r = place_scores(torch.tensor([5.0, 7.0], device=device), mask, backend=backend)
    zero = torch.zeros_like(r)
    out = lambda_returns(zero, zero, r, tau=0.1, lam=1.0, mask=mask, backend="reference")
    assert torch.equal(out.returns, 5.0 * mask * torch.tensor([[1.0], [0.0]], device=device))


@places
@pytest.mark.parametrize("length", [1, 2, 31, 511, 512, 513, 1024, 5000])
@pytest.mark.parametrize("packed", [False, True])
def test_long_masked_tails(device, backend, length, packed):
    """On both sides of what a warp looks at in one step; the last active token far from the end."""
    last = torch.tensor([length - 1, 0, -1, length // 2, max(0, length - 513)])
    mask = torch.arange(length) == last[:, None]
    mask |= (torch.arange(length) < last[:, None]) & (torch.rand(5, length) < 0.1)
    want = torch.zeros(5, length)
    rows = last >= 0
    want[rows, last[rows]] = torch.arange(1.0, 6.0)[rows]
    ends = torch.arange(6) * length
    args = {"cu_seqlens": ends.to(device)} if packed else {}
    mask = mask.reshape(-1) if packed else mask
    scores = torch.arange(1.0, 6.0, device=device).bfloat16()
    got = place_scores(scores, mask.to(device), **args, backend=backend)
    assert torch.equal(got.cpu(), want.reshape(-1) if packed else want)
