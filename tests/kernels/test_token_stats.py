# SPDX-License-Identifier: Apache-2.0
"""token_stats: entropy and KL at their corners."""

import math

import pytest
import torch
from oracle import everywhere, same_bits

from klq_kernels import klq_targets, token_logprobs, token_stats

places = everywhere("token_stats")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@places
def test_uniform_and_one_hot_rows(device, backend):
    uniform = torch.zeros(2, 1000, device=device)
    stats = token_stats(uniform, torch.tensor([0, 999], device=device), backend=backend)
    torch.testing.assert_close(stats.entropy, torch.full_like(stats.entropy, math.log(1000)))
    assert stats.ref_logprobs is None and stats.kl is None
    hot = torch.full((1, 1000), -torch.inf, device=device)
    hot[0, 5] = 3.0
    stats = token_stats(hot, torch.tensor([5], device=device), backend=backend)
    assert stats.entropy[0] == 0 and stats.logprobs[0] == 0


@places
def test_rule_8_terms_without_probability(device, backend):
    """A KL term is 0 where pi = 0, also where pi_b = 0 too; pi > 0 over pi_b = 0 is +inf."""
    z, b = draw(3, 12, device=device), draw(3, 12, seed=1, device=device)
    z[:, 3] = -torch.inf
    b[1, 3] = -torch.inf  # both
    b[2, 4] = -torch.inf  # the reference alone
    kl = token_stats(z, torch.zeros(3, dtype=torch.long, device=device), ref_logits=b,
                     backend=backend).kl  # fmt: skip
    keep = torch.arange(12, device=device) != 3
    log_pi = z[:2, keep].double().log_softmax(-1)
    log_b = b[:2].double().log_softmax(-1)[:, keep]
    want = (log_pi.exp() * (log_pi - log_b)).sum(-1)
    torch.testing.assert_close(kl[:2].double(), want, rtol=1e-5, atol=1e-6)
    assert kl[2] == torch.inf


@places
def test_kl_of_a_model_with_itself_is_exactly_zero(device, backend):
    z = draw(6, 4099, device=device) * 5
    stats = token_stats(
        z, torch.arange(6, device=device), ref_logits=z.clone(), temperature=0.7, backend=backend
    )
    assert torch.count_nonzero(stats.kl) == 0
    assert same_bits(stats.logprobs, stats.ref_logprobs)


@places
def test_log_probs_are_those_of_token_logprobs(device, backend):
    """One kernel path for rollout and training: the same bits (case 73)."""
    z, b = draw(6, 1500, device=device), draw(6, 1500, seed=1, device=device)
    actions = torch.arange(6, device=device)
    how = {"temperature": 0.7, "logit_softcap": 4.0, "backend": backend}
    stats = token_stats(z, actions, ref_logits=b, **how)
    assert same_bits(stats.logprobs, token_logprobs(z, actions, **how))
    assert same_bits(stats.ref_logprobs, token_logprobs(b, actions, **how))


@places
@pytest.mark.parametrize("low", [-1e9, -3.4e38])
def test_masks_made_of_large_negative_logits(device, backend, low):
    """A top-k or grammar mask of finfo.min is no -inf, but as good as one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((3, 50304), low)
    logits[:, :100] = torch.randn(3, 100, generator=generator)
    logits[2] = logits[2].flip(0)
    reference = logits + 0.1 * torch.randn(3, 50304, generator=generator)
    logits, reference = logits.to(device), reference.to(device)
    actions = torch.tensor([5, 99, 50304 - 7], device=device)
    out = token_stats(logits, actions, ref_logits=reference, backend=backend)
    truth = token_stats(
        logits.double(), actions, ref_logits=reference.double(), backend="reference"
    )
    for got, want in zip(out, truth, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)


@places
def test_rows_of_one_huge_value_and_of_nothing(device, backend):
    """Flat rows at the edge of float32 have their entropy; a row without any token has none."""
    logits = torch.full((2, 1000), 3e38, device=device)
    logits[1] = -torch.inf
    out = token_stats(logits, torch.tensor([3, 3], device=device), backend=backend)
    torch.testing.assert_close(out.entropy[0].cpu(), torch.tensor(1000.0).log())
    assert out.logprobs[1].isnan() and out.entropy[1].isnan()


@places
def test_every_op_gives_a_log_prob_the_same_bits(device, backend):
    """6-cases 73 at a vocabulary that takes the long-row kernels."""
    logits = (
        torch.randn(60, 50304, generator=torch.Generator().manual_seed(3)).bfloat16().to(device)
    )
    actions = torch.randint(50304, (60,), generator=torch.Generator().manual_seed(4)).to(device)
    alone = token_logprobs(logits, actions, backend=backend)
    stats = token_stats(logits, actions, ref_logits=logits, backend=backend)
    zero = torch.zeros(60, device=device)
    targets = klq_targets(logits, actions, zero, zero, ref_logprobs=alone, tau=0.1, backend=backend)
    assert torch.equal(alone, stats.logprobs) and torch.equal(alone, stats.ref_logprobs)
    assert torch.count_nonzero(targets.log_ratios) == 0
