# SPDX-License-Identifier: Apache-2.0
"""Boltzmann state values in plain PyTorch."""

import torch
from torch import Tensor

from klq_kernels._checks import wide
from klq_kernels.token_logprobs.reference import log_softmax


@torch.no_grad()
def boltzmann_values(
    q: Tensor,
    ref_logits: Tensor,
    *,
    tau: float,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """V = tau log sum_a pi_b(a|s) exp(Q(s, a) / tau); skips Q = -inf and pi_b = 0."""
    q, ref_logits = q.to(wide(q, ref_logits)), ref_logits.to(wide(q, ref_logits))
    log_pi_b = log_softmax(ref_logits, None, temperature, logit_softcap)
    skipped = (q == -torch.inf) | (log_pi_b == -torch.inf)
    return tau * torch.logsumexp((log_pi_b + q / tau).masked_fill(skipped, -torch.inf), dim=-1)
