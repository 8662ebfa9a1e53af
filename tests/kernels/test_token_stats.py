# SPDX-License-Identifier: Apache-2.0
"""token_stats: entropy and KL at their corners."""

import math

import torch
from oracle import everywhere, same_bits

from klq_kernels import token_logprobs, token_stats

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
