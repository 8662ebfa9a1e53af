# SPDX-License-Identifier: Apache-2.0
"""Log-prob, entropy and exact KL of every row in plain PyTorch."""

import torch
from torch import Tensor

from klq_kernels._checks import wide
from klq_kernels._results import TokenStats
from klq_kernels.token_logprobs.reference import gather, log_softmax


@torch.no_grad()
def token_stats(
    logits: Tensor,
    actions: Tensor,
    *,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> TokenStats:
    """H = -sum_a pi log pi and KL = sum_a pi (log pi - log pi_b); terms with pi = 0 are 0."""
    dtype = wide(logits, ref_logits)
    log_pi = log_softmax(logits.to(dtype), mask, temperature, logit_softcap)
    pi = log_pi.exp()

    def expectation(values: Tensor) -> Tensor:
        total = torch.where(pi == 0, 0.0, pi * values).sum(-1)
        return total if mask is None else torch.where(mask, total, 0.0)

    logprobs, entropy = gather(log_pi, actions, mask), expectation(-log_pi)
    if ref_logits is None:
        return TokenStats(logprobs, entropy, None, None)
    log_pi_b = log_softmax(ref_logits.to(dtype), mask, temperature, logit_softcap)
    return TokenStats(
        logprobs, entropy, gather(log_pi_b, actions, mask), expectation(log_pi - log_pi_b)
    )
