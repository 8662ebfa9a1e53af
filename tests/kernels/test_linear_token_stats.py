# SPDX-License-Identifier: Apache-2.0
"""linear_token_stats: the numbers of the rollout are those of training, and nothing is recorded."""

import math

import torch
from oracle import everywhere, same_bits

from klq_kernels import linear_token_logprobs, linear_token_stats

places = everywhere("linear_token_stats", "linear_token_logprobs")


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@places
def test_log_probs_are_bitwise_those_of_linear_token_logprobs(device, backend):
    h, w = draw(9, 16, device=device), draw(203, 16, seed=1, device=device)
    a, mask = torch.arange(9, device=device), draw(9, seed=2, device=device) < 0.5
    how = {"mask": mask, "temperature": 0.7, "logit_softcap": 5.0, "backend": backend}
    stats = linear_token_stats(h, w, a, **how)
    assert same_bits(stats.logprobs, linear_token_logprobs(h, w, a, **how))
    assert not stats.logprobs.requires_grad


@places
def test_no_graph_is_recorded(device, backend):
    h, w = draw(4, 8, device=device).requires_grad_(), draw(11, 8, device=device).requires_grad_()
    stats = linear_token_stats(h, w, torch.arange(4, device=device), backend=backend)
    assert not stats.logprobs.requires_grad and not stats.entropy.requires_grad


@places
def test_entropy_of_a_zero_hidden_state_is_that_of_the_uniform(device, backend):
    h, w = torch.zeros(3, 8, device=device), draw(1000, 8, device=device)
    stats = linear_token_stats(h, w, torch.arange(3, device=device), backend=backend)
    torch.testing.assert_close(stats.entropy, torch.full_like(stats.entropy, math.log(1000)))
